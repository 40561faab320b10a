//! Sums over several GPUs through NCCL, whose library is opened by name when it is first needed.

use super::{Cuda, DevicePtr};
use crate::{DType, Error};
use cudarc::nccl::sys as nccl;
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Arc, LazyLock};

/// Names of the library, the one of `pip install nvidia-nccl-cu13` first.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

type Code = nccl::ncclResult_t;

/// The functions that are used.
struct Api {
    get_unique_id: unsafe extern "C" fn(*mut nccl::ncclUniqueId) -> Code,
    comm_init_rank: unsafe extern "C" fn(*mut nccl::ncclComm_t, c_int, nccl::ncclUniqueId, c_int) -> Code,
    comm_destroy: unsafe extern "C" fn(nccl::ncclComm_t) -> Code,
    get_error_string: unsafe extern "C" fn(Code) -> *const c_char,
    all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        nccl::ncclDataType_t,
        nccl::ncclRedOp_t,
        nccl::ncclComm_t,
        nccl::cudaStream_t,
    ) -> Code,
    broadcast: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        nccl::ncclDataType_t,
        c_int,
        nccl::ncclComm_t,
        nccl::cudaStream_t,
    ) -> Code,
    // Functions are valid as long as it is open.
    _library: Library,
}

impl Api {
    fn open() -> Result<Api, String> {
        // SAFETY: NCCL's initialisers run, which are made to be run by any process.
        let opened = NAMES.iter().find_map(|name| unsafe { Library::new(*name) }.ok());
        let library = opened.ok_or(
            "NCCL was not found (libnccl.so.2), and several GPUs work together through it; install it (for instance \
             `pip install nvidia-nccl-cu13`) and put its folder on LD_LIBRARY_PATH",
        )?;
        let missing = |e: libloading::Error| format!("NCCL is too old: {e}");
        // SAFETY: the types are those of nccl.h.
        unsafe {
            Ok(Api {
                get_unique_id: *library.get(b"ncclGetUniqueId\0").map_err(missing)?,
                comm_init_rank: *library.get(b"ncclCommInitRank\0").map_err(missing)?,
                comm_destroy: *library.get(b"ncclCommDestroy\0").map_err(missing)?,
                get_error_string: *library.get(b"ncclGetErrorString\0").map_err(missing)?,
                all_reduce: *library.get(b"ncclAllReduce\0").map_err(missing)?,
                broadcast: *library.get(b"ncclBroadcast\0").map_err(missing)?,
                _library: library,
            })
        }
    }

    /// The library, opened once.
    fn get() -> Result<&'static Api, Error> {
        static API: LazyLock<Result<Api, String>> = LazyLock::new(Api::open);
        API.as_ref().map_err(|why| Error::Device("nccl".into(), why.clone()))
    }

    fn text(&self, code: Code) -> String {
        // SAFETY: NCCL returns a static string for every code.
        unsafe { CStr::from_ptr((self.get_error_string)(code)) }.to_string_lossy().into_owned()
    }

    fn ok(&self, code: Code, what: &str) -> Result<(), Error> {
        match code {
            Code::ncclSuccess => Ok(()),
            code => Err(Error::Device("nccl".into(), format!("{what}: {}", self.text(code)))),
        }
    }
}

/// What the members of a group must know to find each other: made by one of them and brought to the others by whatever starts them.
pub type GroupId = [u8; 128];

/// Devices that add up arrays; each member is one process or thread with its own device.
pub struct Group {
    api: &'static Api,
    cuda: Arc<Cuda>,
    comm: nccl::ncclComm_t,
    rank: usize,
    size: usize,
}

// SAFETY: NCCL's communicators may be used by any thread, by one at a time; `sum` and `broadcast` take `&mut self`.
unsafe impl Send for Group {}

impl Group {
    /// A new group's id.
    ///
    /// # Errors
    /// When NCCL is missing or finds no network interface.
    pub fn new_id() -> Result<GroupId, Error> {
        let api = Api::get()?;
        let mut id = nccl::ncclUniqueId { internal: [0; 128] };
        // SAFETY: writes the id.
        api.ok(unsafe { (api.get_unique_id)(&mut id) }, "making a group")?;
        Ok(id.internal.map(|c| c as u8))
    }

    /// Joins as member `rank` of `size`, with a device of its own; waits for all the others.
    ///
    /// # Errors
    /// When NCCL is missing or the members don't find each other.
    pub fn join(cuda: &Arc<Cuda>, id: &GroupId, rank: usize, size: usize) -> Result<Group, Error> {
        let api = Api::get()?;
        cuda.check()?;
        cuda.enter();
        let (id, mut comm) = (nccl::ncclUniqueId { internal: id.map(|b| b as c_char) }, std::ptr::null_mut());
        // SAFETY: the device's context is current; the communicator is written.
        let code = unsafe { (api.comm_init_rank)(&mut comm, size as c_int, id, rank as c_int) };
        api.ok(code, &format!("joining a group as {rank} of {size}"))?;
        Ok(Group { api, cuda: cuda.clone(), comm, rank, size })
    }

    /// This member's number, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Members.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Puts in every member's array of `n` elements at `p` the sum of all members'. All members call it, in the same order. Enqueued; what fails
    /// is reported by the device's `check`.
    pub fn sum(&mut self, p: DevicePtr, n: usize, dtype: DType) {
        let (api, data) = (self.api, p.0 as *mut c_void);
        self.enqueue("a sum over the GPUs", |comm, stream| {
            // SAFETY: the array has n elements and lives as long as work is enqueued on its device's stream, like every buffer's.
            unsafe { (api.all_reduce)(data, data, n, of(dtype), nccl::ncclRedOp_t::ncclSum, comm, stream) }
        });
    }

    /// Puts in every member's array the one of member `root`, in the same way.
    pub fn broadcast(&mut self, p: DevicePtr, n: usize, dtype: DType, root: usize) {
        let (api, data) = (self.api, p.0 as *mut c_void);
        self.enqueue("an array sent to the other GPUs", |comm, stream| {
            // SAFETY: as above.
            unsafe { (api.broadcast)(data, data, n, of(dtype), root as c_int, comm, stream) }
        });
    }

    fn enqueue(&self, what: &str, call: impl FnOnce(nccl::ncclComm_t, nccl::cudaStream_t) -> Code) {
        if self.cuda.enter()
            && let Err(e) = self.api.ok(call(self.comm, self.cuda.stream().cast()), what)
        {
            let _ = self.cuda.failure.set(e.to_string());
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.cuda.synchronize();
        // SAFETY: the communicator is used no more. That it cannot be given back would change nothing.
        unsafe { (self.api.comm_destroy)(self.comm) };
    }
}

fn of(dtype: DType) -> nccl::ncclDataType_t {
    match dtype {
        DType::F32 => nccl::ncclDataType_t::ncclFloat32,
        DType::F16 => nccl::ncclDataType_t::ncclFloat16,
        DType::BF16 => nccl::ncclDataType_t::ncclBfloat16,
    }
}
