//! Sums over GPUs.

use anser_tensor::cuda::nccl::Group;
use anser_tensor::{Context, DType, Device};
use std::thread;

#[test]
fn what_is_missing_is_said() {
    // Where NCCL is installed, an id is made.
    if let Err(e) = Group::new_id() {
        assert!(e.to_string().contains("libnccl.so.2") || e.to_string().contains("making a group"), "{e}");
    }
}

#[test]
#[ignore = "needs two GPUs and NCCL"]
fn two_gpus_add_up() {
    let id = Group::new_id().unwrap();
    let member = |rank: usize| {
        let ctx = Context::with_activations(Device::Cuda(rank), DType::BF16, 1).unwrap();
        let mut group = Group::join(ctx.cuda_shared().unwrap(), &id, rank, 2).unwrap();
        assert_eq!((group.rank(), group.size()), (rank, 2));
        let n = 100_003;
        let mine: Vec<f32> = (0..n).map(|i| ((i * 7 + rank * 13) % 101) as f32 - 50.0).collect();
        for dtype in [DType::F32, DType::BF16] {
            let mut x = if dtype == DType::F32 { ctx.alloc_f32(n) } else { ctx.alloc(n) };
            x.copy_from(&mine);
            group.sum(x.ptr(), n, dtype);
            ctx.check().unwrap();
            // Whole numbers up to 100 are exact in both types.
            let want = (0..n).map(|i| ((i * 7) % 101 + (i * 7 + 13) % 101) as f32 - 100.0);
            assert!(x.to_vec().into_iter().eq(want), "{dtype}");
            x.copy_from(&mine);
            group.broadcast(x.ptr(), n, dtype, 1);
            ctx.check().unwrap();
            assert!(x.to_vec().into_iter().eq((0..n).map(|i| ((i * 7 + 13) % 101) as f32 - 50.0)), "{dtype}");
        }
    };
    thread::scope(|s| {
        let other = s.spawn(|| member(1));
        member(0);
        other.join().unwrap();
    });
}
