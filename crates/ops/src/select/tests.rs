use crate::testing::{check, matrix};

#[test]
fn values_and_gradients() {
    for rows in [&[][..], &[4], &[0, 2, 3]] {
        check(
            &[matrix(5, 3, 1, 1.0)],
            &[],
            |t, v, _| vec![t.select(&v[0], rows, rows.len())],
            |x| vec![rows.iter().flat_map(|&r| x[0][r as usize * 3..][..3].to_vec()).collect()],
        );
    }
}

#[test]
fn rows_beyond_those_chosen_give_no_gradient() {
    // The check's projection gives the padding a gradient, too: it goes nowhere.
    check(
        &[matrix(5, 3, 1, 1.0)],
        &[],
        |t, v, _| {
            let y = t.select(&v[0], &[1, 3], 4);
            assert_eq!(y.rows(), 4);
            vec![t.select(&y, &[0, 1], 2)]
        },
        |x| vec![[1, 3].iter().flat_map(|&r: &usize| x[0][r * 3..][..3].to_vec()).collect()],
    );
}
