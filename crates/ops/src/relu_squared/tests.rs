use crate::testing::{check, matrix};

#[test]
fn values_and_gradients() {
    for (rows, scale) in [(0, 1.0), (1, 1.0), (70, 1.0), (2, 1e6)] {
        check(
            &[matrix(rows, 3, 1, scale)],
            &[],
            |t, x, _| vec![t.relu_squared(x[0].clone())],
            |x| vec![x[0].iter().map(|x| x.max(0.0).powi(2)).collect()],
        );
    }
}
