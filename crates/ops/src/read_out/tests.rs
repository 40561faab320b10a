use crate::testing::{check, matrix};

const HEADS: usize = 2;

/// x is y, r, k, v, gate, r_k, weight, bias.
fn reference(x: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let c = x[6].len();
    let n = c / HEADS;
    let at = |i: usize| {
        let (j, head) = (i % c, i / n * n);
        let y = &x[0][head..head + n];
        let mean = y.iter().sum::<f64>() / n as f64;
        let variance = y.iter().map(|y| (y - mean).powi(2)).sum::<f64>() / n as f64;
        let norm = (x[0][i] - mean) / (variance + 64e-5).sqrt() * x[6][j] + x[7][j];
        let bonus: f64 = (0..n).map(|l| x[1][head + l] * x[2][head + l] * x[5][head % c + l]).sum();
        (norm + bonus * x[3][i]) * x[4][i]
    };
    vec![(0..x[0].len()).map(at).collect()]
}

#[test]
fn values_and_gradients() {
    for (rows, n, scale) in [(0, 4, 1.0), (1, 4, 1.0), (40, 4, 1.0), (3, 17, 1.0), (2, 4, 1e4)] {
        let c = HEADS * n;
        let leaves: Vec<_> = (0..5).map(|i| matrix(rows, c, i, if i == 0 { scale } else { 1.0 })).collect();
        check(
            &leaves,
            &[matrix(HEADS, n, 5, 1.0), matrix(1, c, 6, 1.0), matrix(1, c, 7, 1.0)],
            |t, x, p| vec![t.read_out(&x[0], &x[1], &x[2], &x[3], &x[4], p[0], p[1], p[2], HEADS)],
            reference,
        );
    }
}
