//! The part of quantrature/c_api.h that the example uses, by hand. Every argument struct begins with its size.
use std::ffi::{c_char, c_void, CStr};

pub type Status = i32;
pub const OK: Status = 0;
pub const F32: i32 = 0;
pub const MSE: i32 = 1;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Matrix {
    pub data: *const c_void,
    pub rows: i64,
    pub cols: i64,
    pub row_stride: i64,
    pub dtype: i32,
}

#[repr(C)]
pub struct MutableMatrix {
    pub data: *mut c_void,
    pub rows: i64,
    pub cols: i64,
    pub row_stride: i64,
    pub dtype: i32,
}

#[repr(C)]
pub struct QuantizeArgs {
    pub struct_size: usize,
    pub w: Matrix,
    pub bits: i32,
    pub group_size: i64,
    pub axis: i32,
    pub sym: i32,
    pub solver: i32,
    pub round_zero: i32,
    pub exclude_row_offsets: *const i64,
    pub exclude_columns: *const i32,
    pub codes: *mut u8,
    pub codes_size: i64,
    pub scale: *mut f32,
    pub zero: *mut f32,
    pub groups: i64,
}

#[repr(C)]
pub struct GridMatrix {
    pub codes: *const u8,
    pub codes_size: i64,
    pub rows: i64,
    pub cols: i64,
    pub bits: i32,
    pub group_size: i64,
    pub scale: Matrix,
    pub zero: Matrix,
}

#[repr(C)]
pub struct Csr {
    pub values: *const c_void,
    pub columns: *const c_void,
    pub row_offsets: *const c_void,
    pub rows: i64,
    pub cols: i64,
    pub nnz: i64,
    pub dtype: i32,
}

#[repr(C)]
pub struct MatvecArgs {
    pub struct_size: usize,
    pub w: GridMatrix,
    pub residuals: Csr,
    pub x: Matrix,
    pub out: MutableMatrix,
}

#[repr(C)]
pub struct AllocateArgs {
    pub struct_size: usize,
    pub costs: *const f64,
    pub sizes: *const i64,
    pub option_offsets: *const i64,
    pub items: i64,
    pub budget: i64,
    pub relative_gap: f64,
    pub max_states: i64,
    pub chosen: *mut i64,
    pub cost: *mut f64,
    pub size: *mut i64,
    pub bound: *mut f64,
}

extern "C" {
    pub fn qtr_version() -> *const c_char;
    fn qtr_last_error() -> *const c_char;
    pub fn qtr_quantize(args: *const QuantizeArgs) -> Status;
    pub fn qtr_matvec(args: *const MatvecArgs) -> Status;
    pub fn qtr_allocate(args: *const AllocateArgs) -> Status;
}

/// The text of the last failure on this thread.
pub fn last_error() -> String {
    unsafe { CStr::from_ptr(qtr_last_error()) }.to_string_lossy().into_owned()
}

/// A status as a result.
pub fn checked(status: Status) -> Result<(), String> {
    if status == OK { Ok(()) } else { Err(last_error()) }
}

/// A slice as rows of `cols` numbers.
pub fn matrix(data: &[f32], cols: usize) -> Matrix {
    let cols = cols as i64;
    Matrix { data: data.as_ptr().cast(), rows: data.len() as i64 / cols, cols, row_stride: cols, dtype: F32 }
}
