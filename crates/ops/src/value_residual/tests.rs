use crate::testing::{check, matrix};

#[test]
fn values_and_gradients() {
    // Logits up to 60 saturate the gate.
    for (rows, scale) in [(0, 1.0), (1, 1.0), (70, 3.0), (5, 60.0)] {
        check(
            &[matrix(rows, 3, 1, 1.0), matrix(rows, 3, 2, 1.0), matrix(rows, 3, 3, scale)],
            &[],
            |t, x, _| vec![t.value_residual(&x[0], &x[1], &x[2])],
            |x| {
                let y = |i: usize| x[0][i] + (x[1][i] - x[0][i]) / (1.0 + (-x[2][i]).exp());
                vec![(0..x[0].len()).map(y).collect()]
            },
        );
    }
}
