//! A double-array trie: the child of node s for byte c is `base[s] + c`, if that slot says that its parent is s.

#[derive(Clone, Copy, Default)]
struct Node {
    base: u32,
    /// Parent + 1; 0: free.
    parent: u32,
    /// Id of the token that ends here; 0: none.
    token: u32,
}

pub(crate) struct Trie {
    nodes: Vec<Node>,
}

impl Trie {
    /// A trie of (bytes, id > 0); `None` if two are equal.
    pub(crate) fn new<'a>(tokens: impl Iterator<Item = (&'a [u8], u32)>) -> Option<Trie> {
        let mut tokens: Vec<(&[u8], u32)> = tokens.collect();
        tokens.sort_unstable();
        if tokens.windows(2).any(|w| w[0].0 == w[1].0) {
            return None;
        }
        let mut trie = Trie { nodes: vec![Node::default(); 1 << 16] };
        trie.nodes[0].parent = u32::MAX;
        // Nodes to fill: (slot, tokens that pass through it, depth). Slots below `free` are taken.
        let mut work = vec![(0usize, 0..tokens.len(), 0usize)];
        let mut free = 1;
        while let Some((slot, mut range, depth)) = work.pop() {
            if let Some((bytes, id)) = tokens[range.clone()].first()
                && bytes.len() == depth
            {
                trie.nodes[slot].token = *id;
                range.start += 1;
            }
            let mut children: Vec<(u8, std::ops::Range<usize>)> = Vec::new();
            for i in range {
                let c = tokens[i].0[depth];
                match children.last_mut() {
                    Some((last, r)) if *last == c => r.end = i + 1,
                    _ => children.push((c, i..i + 1)),
                }
            }
            let Some(&(first, _)) = children.first() else { continue };
            while trie.nodes[free].parent != 0 {
                free += 1;
            }
            let mut base = free.max(first as usize + 1) - first as usize;
            loop {
                if trie.nodes.len() < base + 512 {
                    trie.nodes.resize((base + 512) * 3 / 2, Node::default());
                }
                if children.iter().all(|(c, _)| trie.nodes[base + *c as usize].parent == 0) {
                    break;
                }
                base += 1;
            }
            trie.nodes[slot].base = base as u32;
            for (c, range) in children {
                trie.nodes[base + c as usize].parent = slot as u32 + 1;
                work.push((base + c as usize, range, depth + 1));
            }
        }
        Some(trie)
    }

    /// Greedy longest matches. Every single byte must be a token.
    pub(crate) fn encode(&self, text: &[u8]) -> Vec<u32> {
        let mut out = Vec::with_capacity(text.len() / 3);
        let mut at = 0;
        while at < text.len() {
            let (mut slot, mut best, mut end) = (0usize, 0, at + 1);
            for (i, &c) in text[at..].iter().enumerate() {
                let next = self.nodes[slot].base as usize + c as usize;
                let node = self.nodes[next];
                if node.parent != slot as u32 + 1 {
                    break;
                }
                slot = next;
                if node.token != 0 {
                    (best, end) = (node.token, at + i + 1);
                }
            }
            out.push(best);
            at = end;
        }
        out
    }
}
