//! A head's state as the recurrence takes it.

use super::as_rows;

/// Lanes of a panel.
pub(super) const LANES: usize = 16;

/// Sixteen rows of a head's state with the value index innermost: [key][16 values]. Rows never mix, so that a panel goes
/// through many tokens in the first-level cache, and no sum runs across lanes.
pub(super) type Panel<const N: usize> = [[f32; LANES]; N];

/// A head's state [value][key] in panels.
pub(super) fn to_panels<const N: usize>(rows: &[f32], panels: &mut [Panel<N>]) {
    for (rows, panel) in as_rows::<N>(rows).as_chunks::<LANES>().0.iter().zip(panels) {
        for (j, keys) in panel.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            for (q, rows) in rows.as_chunks::<4>().0.iter().enumerate() {
                let turned = transposed(rows.each_ref().map(|row| &row.as_chunks::<4>().0[j]));
                keys.iter_mut().zip(turned).for_each(|(lanes, v)| lanes.as_chunks_mut::<4>().0[q] = v);
            }
        }
    }
}

/// Panels as a head's state [value][key].
pub(super) fn from_panels<const N: usize>(panels: &[Panel<N>], rows: &mut [f32]) {
    for (rows, panel) in rows.as_chunks_mut::<N>().0.as_chunks_mut::<LANES>().0.iter_mut().zip(panels) {
        for (q, rows) in rows.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            for (j, keys) in panel.as_chunks::<4>().0.iter().enumerate() {
                let turned = transposed(keys.each_ref().map(|lanes| &lanes.as_chunks::<4>().0[q]));
                rows.iter_mut().zip(turned).for_each(|(row, v)| row.as_chunks_mut::<4>().0[j] = v);
            }
        }
    }
}

/// A square on its other side. Compilers move its elements one by one.
#[inline(always)]
fn transposed(m: [&[f32; 4]; 4]) -> [[f32; 4]; 4] {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        let mut out = [[0.0; 4]; 4];
        // SAFETY: all loads and stores are of four elements.
        unsafe {
            let [a, b, c, d] = m.map(|row| _mm_loadu_ps(row.as_ptr()));
            let (low, high) =
                ([_mm_unpacklo_ps(a, b), _mm_unpacklo_ps(c, d)], [_mm_unpackhi_ps(a, b), _mm_unpackhi_ps(c, d)]);
            let pairs = [low, high].map(|[p, q]| [_mm_movelh_ps(p, q), _mm_movehl_ps(q, p)]);
            out.iter_mut().zip(pairs.as_flattened()).for_each(|(to, v)| _mm_storeu_ps(to.as_mut_ptr(), *v));
        }
        out
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::array::from_fn(|i| m.map(|row| row[i]))
}
