use crate::testing::{check, matrix};

fn reference(x: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let c = x[1].len();
    let row = |r: &[f64]| -> Vec<f64> {
        let mean = r.iter().sum::<f64>() / c as f64;
        let variance = r.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / c as f64;
        (0..c).map(|j| (r[j] - mean) / (variance + 1e-5).sqrt() * x[1][j] + x[2][j]).collect()
    };
    vec![x[0].chunks(c).flat_map(row).collect()]
}

#[test]
fn values_and_gradients() {
    for (rows, c, scale) in [(0, 5, 1.0), (1, 5, 1.0), (70, 5, 1.0), (2, 33, 1.0), (3, 5, 1e5), (3, 19, 1e-2)] {
        check(
            &[matrix(rows, c, 1, scale)],
            &[matrix(1, c, 2, 1.0), matrix(1, c, 3, 1.0)],
            |t, x, p| vec![t.layer_norm(&x[0], p[0], p[1])],
            reference,
        );
    }
}

#[test]
fn a_large_mean_costs_little_accuracy() {
    let mut x = matrix(2, 40, 1, 1.0);
    // Multiples of 1/64 stay exact beside 1000: only the statistics are tested.
    x.2.iter_mut().for_each(|x| *x = 1000.0 + (*x * 64.0).round() / 64.0);
    check(
        &[x],
        &[matrix(1, 40, 2, 1.0), matrix(1, 40, 3, 1.0)],
        |t, x, p| vec![t.layer_norm(&x[0], p[0], p[1])],
        reference,
    );
}
