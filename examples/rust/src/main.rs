//! Quantizes a matrix, multiplies it, and shares a budget out, through the C interface. Prints the product, one number
//! a line, then the options chosen; quantrature.ops gives the same.
mod quantrature;

use quantrature::{checked, last_error, matrix, AllocateArgs, Csr, GridMatrix, MatvecArgs, MutableMatrix, QuantizeArgs};
use std::{ffi::CStr, mem, ptr};

const ROWS: usize = 6;
const COLS: usize = 80;
const GROUP: usize = 32;
const BITS: usize = 3;

fn main() -> Result<(), String> {
    let w: Vec<f32> = (0..ROWS * COLS).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
    let x: Vec<f32> = (0..COLS).map(|j| ((j * 13) % 29) as f32 / 16.0 - 0.875).collect();
    let groups = ROWS * COLS.div_ceil(GROUP);
    let mut codes = vec![0u8; ROWS * BITS * COLS.div_ceil(8)];
    let (mut scale, mut zero) = (vec![0f32; groups], vec![0f32; groups]);
    let mut quantize = QuantizeArgs {
        struct_size: mem::size_of::<QuantizeArgs>(),
        w: matrix(&w, COLS),
        bits: BITS as i32,
        group_size: GROUP as i64,
        axis: 1,
        sym: 0,
        solver: quantrature::MSE,
        round_zero: 0,
        exclude_row_offsets: ptr::null(),
        exclude_columns: ptr::null(),
        codes: codes.as_mut_ptr(),
        codes_size: codes.len() as i64,
        scale: scale.as_mut_ptr(),
        zero: zero.as_mut_ptr(),
        groups: groups as i64,
    };
    checked(unsafe { quantrature::qtr_quantize(&quantize) })?;

    let mut y = vec![0f32; ROWS];
    let product = MatvecArgs {
        struct_size: mem::size_of::<MatvecArgs>(),
        w: GridMatrix {
            codes: codes.as_ptr(),
            codes_size: codes.len() as i64,
            rows: ROWS as i64,
            cols: COLS as i64,
            bits: BITS as i32,
            group_size: GROUP as i64,
            scale: matrix(&scale, groups),
            zero: matrix(&zero, groups),
        },
        residuals: unsafe { mem::zeroed::<Csr>() }, // no row offsets: there are none
        x: matrix(&x, COLS),
        out: MutableMatrix {
            data: y.as_mut_ptr().cast(),
            rows: 1,
            cols: ROWS as i64,
            row_stride: ROWS as i64,
            dtype: quantrature::F32,
        },
    };
    checked(unsafe { quantrature::qtr_matvec(&product) })?;
    for value in &y {
        println!("{value}");
    }

    let (costs, sizes, offsets) = ([9.0, 3.0, 1.0, 5.0, 2.0, 0.5], [2, 3, 4, 2, 3, 4], [0, 3, 6]);
    let mut chosen = [0i64; 2];
    let allocate = AllocateArgs {
        struct_size: mem::size_of::<AllocateArgs>(),
        costs: costs.as_ptr(),
        sizes: sizes.as_ptr(),
        option_offsets: offsets.as_ptr(),
        items: 2,
        budget: 6,
        relative_gap: 0.0,
        max_states: 0,
        chosen: chosen.as_mut_ptr(),
        cost: ptr::null_mut(),
        size: ptr::null_mut(),
        bound: ptr::null_mut(),
    };
    checked(unsafe { quantrature::qtr_allocate(&allocate) })?;
    println!("{} {}", chosen[0], chosen[1]);

    quantize.bits = 9;
    if checked(unsafe { quantrature::qtr_quantize(&quantize) }).is_ok() {
        return Err("9 bits were accepted".into());
    }
    let version = unsafe { CStr::from_ptr(quantrature::qtr_version()) }.to_string_lossy();
    eprintln!("quantrature {version} refuses 9 bits: {}", last_error());
    Ok(())
}
