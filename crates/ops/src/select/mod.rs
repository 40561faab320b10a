//! Some rows of a matrix: y_i = `x[rows_i]`. Backward: `dx[rows_i]` += dy_i, and nothing for the other rows.

use crate::embedding::cuda::rows_of;
use crate::{Tape, Var};

#[cfg(test)]
mod tests;

/// What a row of the gradient is where no row of y came from it: row `none` of what is gathered, which is zero.
fn inverse(rows: &[u32], all: usize, none: usize) -> Vec<u32> {
    let mut from = vec![none as u32; all];
    rows.iter().enumerate().for_each(|(i, &row)| from[row as usize] = i as u32);
    from
}

impl Tape<'_> {
    /// Rows `rows` of x [n, C], each once at most, and zeros or other rows of x up to `room` of them: [room, C]. What follows makes no use of those.
    ///
    /// # Panics
    /// If there is no such row, or no room.
    pub fn select(&mut self, x: &Var, rows: &[u32], room: usize) -> Var {
        let (all, c) = (x.rows(), x.cols());
        assert!(rows.len() <= room && rows.iter().all(|&r| (r as usize) < all));
        let mut y = self.ctx().alloc(room * c);
        if let Some(gpu) = self.ctx().cuda() {
            let mut padded = rows.to_vec();
            padded.resize(room, 0);
            rows_of(self.ctx(), gpu, x.buf().ptr(), &padded, &y, c);
        }
        self.run(|| {
            let (chosen, rest) = y.split_at_mut(rows.len() * c);
            for (y, &row) in chosen.chunks_exact_mut(c).zip(rows) {
                y.copy_from_slice(&x.data()[row as usize * c..][..c]);
            }
            rest.fill(0.0);
        });
        let needs = self.needs_grad(&[x], &[]);
        let out = self.output(room, c, y, needs);
        if needs {
            let (dy, slot, rows) = (out.slot(), x.slot(), rows.to_vec());
            self.record(move |b| {
                let Some(dy) = dy.take() else { return };
                let mut dx = b.ctx().alloc(all * c);
                if let Some(gpu) = b.ctx().cuda() {
                    let mut with_zero = b.ctx().alloc((room + 1) * c);
                    with_zero.write_part(0, &dy, 0, room * c);
                    gpu.clear(with_zero.ptr().offset(room * c, with_zero.dtype()), c * with_zero.dtype().size());
                    rows_of(b.ctx(), gpu, with_zero.ptr(), &inverse(&rows, all, room), &dx, c);
                }
                b.run(|_| {
                    dx.fill(0.0);
                    for (d, &row) in dy.chunks_exact(c).zip(&rows) {
                        dx[row as usize * c..][..c].copy_from_slice(d);
                    }
                });
                slot.add(dx);
            });
        }
        out
    }
}
