//! A matrix that grows at its end and keeps what it has.

use crate::{Buf, Context, DType};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

/// Rows [len, cols] that are appended to and never change. Clones share memory, and whoever appends first goes on in it: keeping
/// an older state costs nothing, and going on twice from the same one costs a copy.
#[derive(Clone)]
pub struct GrowingRows {
    cols: usize,
    len: usize,
    dtype: DType,
    store: Arc<RwLock<Store>>,
}

/// Elements that are copied at a time.
const PART: usize = 1 << 20;

struct Store {
    /// Room for more rows than are there.
    buf: Buf,
    /// Rows of whoever has most.
    taken: usize,
}

impl GrowingRows {
    /// No rows of `cols` elements.
    pub fn new(ctx: &Context, cols: usize, dtype: DType) -> GrowingRows {
        let buf = ctx.alloc_as(dtype, 0);
        GrowingRows { cols, len: 0, dtype, store: Arc::new(RwLock::new(Store { buf, taken: 0 })) }
    }

    /// Number of rows.
    #[allow(clippy::len_without_is_empty)] // nobody asks
    pub fn len(&self) -> usize {
        self.len
    }

    /// Elements of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of memory behind it, shared or not.
    pub fn bytes(&self) -> usize {
        self.read().bytes()
    }

    /// The rows, and whatever lies behind them, for reading.
    pub fn read(&self) -> Guard<'_> {
        Guard(self.store.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// A copy of the values as f32, wherever they are; waits for the device. Who appends meanwhile hardly waits: of a part at a time there is a copy on the
    /// device, and only while that is asked for is the memory held.
    pub fn to_vec(&self) -> Vec<f32> {
        let (all, mut values) = (self.len * self.cols, Vec::new());
        for start in (0..all).step_by(PART) {
            let part = self.read().part(start, PART.min(all - start));
            values.extend(part.to_vec());
        }
        values
    }

    /// These rows and then `count` rows of `from`, from its row `first` on.
    pub fn append(&self, ctx: &Context, from: &Buf, first: usize, count: usize) -> GrowingRows {
        self.append_with(ctx, count, |to, at| to.write_part(at, from, first * self.cols, count * self.cols))
    }

    /// Forgets rows that were appended to these ones, if nobody has them any more: going on from here again costs no copy then.
    pub fn reclaim(&self) {
        let mut store = self.store.write().unwrap_or_else(PoisonError::into_inner);
        if Arc::strong_count(&self.store) == 1 {
            store.taken = self.len;
        }
    }

    /// These rows and then `count` that `write(buffer, first element)` writes.
    pub fn append_with(&self, ctx: &Context, count: usize, write: impl FnOnce(&mut Buf, usize)) -> GrowingRows {
        let (cols, end) = (self.cols, self.len + count);
        let mut store = self.store.write().unwrap_or_else(PoisonError::into_inner);
        if store.taken == self.len && end * cols <= store.buf.len() {
            write(&mut store.buf, self.len * cols);
            store.taken = end;
            drop(store);
            return GrowingRows { len: end, ..self.clone() };
        }
        let mut buf = ctx.alloc_as(self.dtype, end.next_power_of_two() * cols);
        buf.write_part(0, &store.buf, 0, self.len * cols);
        write(&mut buf, self.len * cols);
        GrowingRows { len: end, store: Arc::new(RwLock::new(Store { buf, taken: end })), ..*self }
    }
}

/// The memory of a [`GrowingRows`], held for reading: nothing is appended meanwhile.
pub struct Guard<'a>(RwLockReadGuard<'a, Store>);

impl std::ops::Deref for Guard<'_> {
    type Target = Buf;
    fn deref(&self) -> &Buf {
        &self.0.buf
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_to_go_on_shares_memory_and_the_second_copies() {
        let ctx = Context::cpu(1);
        let row = |x: f32| ctx.copy_of(&[x, -x]);
        let empty = GrowingRows::new(&ctx, 2, DType::F32);
        let one = empty.append(&ctx, &row(1.0), 0, 1);
        let three = one.append(&ctx, &ctx.copy_of(&[9.0, 9.0, 2.0, -2.0, 3.0, -3.0]), 1, 2);
        let four = three.append(&ctx, &row(4.0), 0, 1);
        assert!(Arc::ptr_eq(&three.store, &four.store) && !Arc::ptr_eq(&one.store, &three.store));
        let other = three.append(&ctx, &row(5.0), 0, 1);
        assert!(!Arc::ptr_eq(&three.store, &other.store));
        assert_eq!((empty.len(), one.to_vec()), (0, vec![1.0, -1.0]));
        assert_eq!(three.to_vec(), [1.0, -1.0, 2.0, -2.0, 3.0, -3.0]);
        assert_eq!((&four.to_vec()[6..], &other.to_vec()[6..]), (&[4.0, -4.0][..], &[5.0, -5.0][..]));
        assert_eq!(four.bytes(), 4 * 2 * 4);
        // Copies are of any number of parts.
        let wide = GrowingRows::new(&ctx, 3, DType::F32);
        let values: Vec<f32> = (0..PART + 2).map(|i| i as f32).collect();
        assert_eq!(wide.append(&ctx, &ctx.copy_of(&values), 0, values.len() / 3).to_vec(), values);
        // Once nobody has the fourth row its room is free again.
        three.reclaim();
        assert!(!Arc::ptr_eq(&three.store, &three.append(&ctx, &row(5.0), 0, 1).store));
        drop(four);
        three.reclaim();
        assert!(Arc::ptr_eq(&three.store, &three.append(&ctx, &row(5.0), 0, 1).store));
    }
}
