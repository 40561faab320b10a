//! State tracking: the word problem of a finite group (Merrill, Petty and Sabharwal, "The Illusion of State in State-Space
//! Models", arXiv 2404.08819). Inputs are random elements, the target at every position is the product of all so far.

use crate::Batch;
use crate::random::Random;
use std::fmt;
use std::str::FromStr;

/// A group whose word problem is posed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Group {
    /// All permutations of five things, 120 elements: not solvable, its word problem is complete for NC1.
    S5,
    /// The even permutations of five things, 60 elements: the smallest group that is not solvable.
    A5,
    /// Even permutations of four things and numbers modulo 5, 60 elements: solvable, not commutative.
    A4xZ5,
    /// Numbers modulo 60 under addition: commutative.
    Z60,
    /// All permutations of three things, 6 elements: the smallest group that is not commutative.
    S3,
    /// Numbers modulo 2: parity.
    Z2,
}

impl Group {
    /// All of them.
    pub const ALL: [Group; 6] = [Group::S5, Group::A5, Group::A4xZ5, Group::Z60, Group::S3, Group::Z2];

    /// The group as pairs: permutations of so many things, whether only the even ones, and numbers modulo so many.
    fn parts(self) -> (usize, bool, usize) {
        match self {
            Group::S5 => (5, false, 1),
            Group::A5 => (5, true, 1),
            Group::A4xZ5 => (4, true, 5),
            Group::Z60 => (1, false, 60),
            Group::S3 => (3, false, 1),
            Group::Z2 => (1, false, 2),
        }
    }

    /// The multiplication table.
    pub fn table(self) -> Table {
        self.build(|_| true)
    }

    /// The same with swaps for inputs: the permutations that exchange two things, and the identity. Their products are the whole group. For groups of all
    /// permutations only.
    pub fn swaps(self) -> Option<Table> {
        let moved = |p: &[usize]| p.iter().enumerate().filter(|&(i, &x)| i != x).count();
        matches!(self, Group::S5 | Group::S3).then(|| self.build(|p| moved(p) <= 2))
    }

    fn build(self, is_input: impl Fn(&[usize]) -> bool) -> Table {
        let (things, even, modulus) = self.parts();
        let mut permutations = vec![Vec::new()];
        for _ in 0..things {
            let longer =
                |p: &Vec<usize>| (0..things).filter(|i| !p.contains(i)).map(|i| [&p[..], &[i]].concat()).collect();
            permutations = permutations.iter().flat_map(|p| -> Vec<Vec<usize>> { longer(p) }).collect();
        }
        permutations.retain(|p| !even || inversions(p).is_multiple_of(2));
        // Sorted, and the identity is the first.
        let elements: Vec<(&Vec<usize>, usize)> =
            permutations.iter().flat_map(|p| (0..modulus).map(move |z| (p, z))).collect();
        let product = |&(p, x): &(&Vec<usize>, usize), &(q, y): &(&Vec<usize>, usize)| {
            let both: Vec<usize> = q.iter().map(|&i| p[i]).collect();
            elements.binary_search(&(&both, (x + y) % modulus)).unwrap_or_else(|_| unreachable!("a group is closed"))
        };
        let products = elements.iter().flat_map(|a| elements.iter().map(move |b| product(a, b) as u32)).collect();
        let inputs = (0..).zip(&elements).filter(|(_, (p, _))| is_input(p)).map(|(i, _)| i).collect();
        Table { order: elements.len(), products, inputs }
    }
}

/// Pairs that stand in the wrong order.
fn inversions(p: &[usize]) -> usize {
    (0..p.len()).map(|i| p[i..].iter().filter(|&&x| x < p[i]).count()).sum()
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl FromStr for Group {
    type Err = String;

    fn from_str(s: &str) -> Result<Group, String> {
        let same = |g: &&Group| g.to_string().eq_ignore_ascii_case(s);
        Group::ALL
            .iter()
            .find(same)
            .copied()
            .ok_or_else(|| format!("no group {s:?}; there are S5, A5, A4xZ5, Z60, S3 and Z2"))
    }
}

/// A group's elements 0.. (0 is the identity) and their products.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    order: usize,
    /// [order, order].
    products: Vec<u32>,
    /// The elements that rows consist of.
    inputs: Vec<u32>,
}

impl Table {
    /// Number of elements.
    pub fn order(&self) -> usize {
        self.order
    }

    /// Number of tokens: the elements and a beginning.
    pub fn vocab(&self) -> usize {
        self.order + 1
    }

    /// a b. For permutations: b first, then a.
    pub fn product(&self, a: u32, b: u32) -> u32 {
        self.products[a as usize * self.order + b as usize]
    }

    /// Rows of a beginning and `len` random inputs; the target at every element is the product of all elements up to it. The
    /// same seed and stream give the same batch.
    pub fn batch(&self, seed: u64, stream: u64, rows: usize, len: usize) -> Batch {
        let mut random = Random::new(seed, stream);
        let (mut tokens, mut targets) = (Vec::new(), Vec::new());
        for _ in 0..rows {
            let mut product = 0;
            tokens.push(self.order as u32);
            targets.push(-1);
            for _ in 0..len {
                let element = self.inputs[random.below(self.inputs.len())];
                product = self.product(product, element);
                tokens.push(element);
                targets.push(product as i32);
            }
        }
        Batch::rows(tokens, targets, len + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_groups_are_groups() {
        for (group, order) in Group::ALL.into_iter().zip([120, 60, 60, 60, 6, 2]) {
            let t = group.table();
            assert_eq!((t.order(), t.products.len()), (order, order * order), "{group}");
            let all = || 0..order as u32;
            for a in all() {
                assert_eq!((t.product(0, a), t.product(a, 0)), (a, a), "{group}: 0 is the identity");
                assert!(all().any(|b| t.product(a, b) == 0 && t.product(b, a) == 0), "{group}: {a} has an inverse");
                for b in all() {
                    assert!((t.product(a, b) as usize) < order);
                    for c in all().step_by(7) {
                        assert_eq!(t.product(t.product(a, b), c), t.product(a, t.product(b, c)), "{group}");
                    }
                }
            }
        }
    }

    /// Elements that are commutators, and everything that products of those give.
    fn commutators(t: &Table, of: &[u32]) -> Vec<u32> {
        let inverse = |a: u32| (0..t.order() as u32).find(|&b| t.product(a, b) == 0).unwrap();
        let mut found: Vec<u32> = Vec::new();
        for &a in of {
            for &b in of {
                found.push(t.product(t.product(a, b), t.product(inverse(a), inverse(b))));
            }
        }
        loop {
            found.sort_unstable();
            found.dedup();
            let more: Vec<u32> =
                found.iter().flat_map(|&a| found.iter().map(move |&b| (a, b))).map(|(a, b)| t.product(a, b)).collect();
            if more.iter().all(|x| found.binary_search(x).is_ok()) {
                return found;
            }
            found.extend(more);
        }
    }

    #[test]
    fn they_are_the_groups_that_they_are_called() {
        // The derived series: S5 > A5 = A5'; A4 x Z5 > V4 > 1; Z60 > 1.
        let series = |g: Group| {
            let t = g.table();
            let mut of: Vec<u32> = (0..t.order() as u32).collect();
            let mut sizes = vec![of.len()];
            for _ in 0..3 {
                of = commutators(&t, &of);
                sizes.push(of.len());
            }
            sizes
        };
        assert_eq!(series(Group::S5), [120, 60, 60, 60]);
        assert_eq!(series(Group::A5), [60, 60, 60, 60]);
        assert_eq!(series(Group::A4xZ5), [60, 4, 1, 1]);
        assert_eq!(series(Group::Z60), [60, 1, 1, 1]);
        assert_eq!((series(Group::S3), series(Group::Z2)), (vec![6, 3, 1, 1], vec![2, 1, 1, 1]));
        // Cyclic: some element's powers are all.
        let t = Group::Z60.table();
        let powers =
            |a: u32| std::iter::successors(Some(a), |&p| Some(t.product(p, a))).position(|p| p == 0).unwrap() + 1;
        assert_eq!(powers(1), 60);
        assert_eq!("a4Xz5".parse::<Group>(), Ok(Group::A4xZ5));
        assert!("Q8".parse::<Group>().unwrap_err().contains("S5"));
    }

    #[test]
    fn targets_are_products_of_all_so_far() {
        let t = Group::A5.table();
        let b = t.batch(1, 2, 30, 20);
        assert_eq!((b.tokens.len(), b.starts.len(), b.len(21)), (630, 30, 30));
        assert_eq!(b, t.batch(1, 2, 30, 20));
        assert_ne!(b, t.batch(1, 3, 30, 20));
        for (x, y) in b.tokens.chunks(21).zip(b.targets.chunks(21)) {
            assert_eq!((x[0], y[0], y[1]), (60, -1, x[1] as i32));
            // From the end: the product of the last two targets' quotient is the element.
            assert!((2..21).all(|i| t.product(y[i - 1] as u32, x[i]) == y[i] as u32));
        }
        assert!((0..60).all(|e| b.tokens.contains(&e)), "every element occurs");
    }

    #[test]
    fn swaps_give_the_whole_group() {
        for (group, swaps) in [(Group::S5, 10), (Group::S3, 3)] {
            let t = group.swaps().unwrap();
            let b = t.batch(1, 2, 500, 20);
            // Each is its own inverse, and all but the identity are odd: an even number of them is never a swap.
            assert_eq!((t.inputs.len(), t.inputs[0]), (1 + swaps, 0));
            let mut given: Vec<u32> = b.tokens.iter().copied().filter(|&e| e != t.order as u32).collect();
            given.sort_unstable();
            given.dedup();
            assert_eq!(given, t.inputs, "every swap occurs, and nothing else");
            assert!(t.inputs.iter().all(|&a| t.product(a, a) == 0));
            assert!(
                t.inputs[1..].iter().all(|&a| t.inputs[1..].iter().all(|&b| !t.inputs[1..].contains(&t.product(a, b))))
            );
            assert!((0..t.order as i32).all(|e| b.targets.contains(&e)), "every product occurs");
        }
        assert!([Group::A5, Group::A4xZ5, Group::Z60, Group::Z2].into_iter().all(|g| g.swaps().is_none()));
    }
}
