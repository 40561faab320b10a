use crate::testing::{check, matrix};

#[test]
fn values_and_gradients() {
    // Token 2 repeats across blocks of rows, token 4 never comes.
    let many: Vec<u32> = (0..70).map(|i| i * 7 % 4).collect();
    for tokens in [&[][..], &[3], &many] {
        check(
            &[],
            &[matrix(5, 3, 1, 1.0)],
            |t, _, p| vec![t.embedding(tokens, &crate::Weight::OutIn(p[0]))],
            |x| vec![tokens.iter().flat_map(|&t| x[0][t as usize * 3..][..3].to_vec()).collect()],
        );
    }
}
