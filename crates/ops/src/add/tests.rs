use crate::testing::{check, matrix};

#[test]
fn values_and_gradients() {
    for rows in [0, 1, 70] {
        check(
            &[matrix(rows, 3, 1, 2.0), matrix(rows, 3, 2, 1.0)],
            &[],
            |t, x, _| vec![t.add(x[0].clone(), &x[1])],
            |x| vec![x[0].iter().zip(&x[1]).map(|(x, y)| x + y).collect()],
        );
    }
}
