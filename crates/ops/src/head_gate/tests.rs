use crate::testing::{check, matrix};

#[test]
fn values_and_gradients() {
    for (rows, heads, n, scale) in [(0, 1, 4, 1.0), (1, 1, 1, 1.0), (40, 3, 4, 2.0), (3, 2, 17, 1.0), (2, 2, 4, 40.0)] {
        check(
            &[matrix(rows, heads * n, 1, 1.0), matrix(rows, heads, 2, scale)],
            &[],
            |t, x, _| vec![t.head_gate(&x[0], &x[1])],
            |x| vec![x[0].iter().enumerate().map(|(i, v)| v / (1.0 + (-x[1][i / n]).exp())).collect()],
        );
    }
}
