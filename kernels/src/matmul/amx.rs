//! Products of bf16 matrices on AMX: a core's eight tile registers, each 16 rows of 64 bytes.
//!
//! Four of them hold a 32 × 32 block of sums, two the rows of A, 32 values of k wide, and two the
//! columns of B in pairs of k, as `pairs` has them. One instruction, TDPBF16PS, adds 32 products to
//! each of 256 sums. What it computes (Intel's Software Developer's Manual, volume 2) is this: the
//! 16 products of even k and the 16 of odd k are each added up in order, fused, from zero; the two
//! are added, and that to the sum. Numbers below the normal ones are zero wherever they come up.
//! [`vectors`] computes the same on vectors, for machines without tiles.

// Tiles are reached through inline assembly, and read and write through raw pointers.
#![allow(unsafe_code)]

use super::Sums;
use super::pack::STEP;
use super::tiles::Call;
use crate::Bf16;
use std::arch::asm;
use std::cell::Cell;
use std::sync::OnceLock;

/// Rows of a tile, and sums in its rows.
pub(super) const SIDE: usize = 16;

/// Whether this machine has tiles and its operating system lets this process use them, for which it
/// is asked once.
pub(crate) fn has() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| has_instructions() && permitted())
}

fn has_instructions() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const OSXSAVE: u32 = 1 << 27;
    const AMX_BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
    const TILE_CONFIGURATION_AND_DATA: u32 = 1 << 17 | 1 << 18;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    let enabled: u32;
    // SAFETY: OSXSAVE says that the instruction exists; it reads a register.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") enabled, out("edx") _, options(nomem, nostack)) };
    __cpuid_count(7, 0).edx & AMX_BF16_AND_TILE == AMX_BF16_AND_TILE
        && enabled & TILE_CONFIGURATION_AND_DATA == TILE_CONFIGURATION_AND_DATA
}

/// Asks Linux for the tiles' state, which is so large that a process has it on demand only.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    let result: i64;
    // SAFETY: a system call that reads no memory of ours, and changes nothing but what we may do.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// What LDTILECFG reads.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

thread_local! {
    /// Rows of the left factor that this thread's tiles are configured for; 0 where they are not.
    static ROWS: Cell<usize> = const { Cell::new(0) };
}

/// Configures this thread's tiles for so many rows, of which the first 16 are in tiles 0, 1 and 4, and
/// the others in 2, 3 and 5. Tiles 6 and 7 hold columns.
///
/// # Safety
/// [`has`] said yes.
unsafe fn configure(rows: usize) {
    if ROWS.replace(rows) == rows {
        return;
    }
    let mut to =
        Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let (first, second) = (rows.min(SIDE), rows.saturating_sub(SIDE));
    for (tile, rows) in [first, first, second, second, first, second, SIDE, SIDE].into_iter().enumerate() {
        (to.row_bytes[tile], to.rows[tile]) = (if rows == 0 { 0 } else { 64 }, rows as u8);
    }
    // SAFETY: the instruction exists, and reads 64 bytes.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const to, options(nostack, readonly)) };
}

/// Gives this thread's tiles back, which the operating system saves at every switch otherwise.
pub(super) fn release() {
    if ROWS.replace(0) != 0 {
        // SAFETY: they were configured, so the instruction exists.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// One block: first sums are zero, then come the steps of k, then sums are stored.
macro_rules! block {
    (
        $call:ident, $to:ident, $stride:ident,
        zero [$($zero:literal)*], step [$($step:literal)*], store [$($store:literal)*]
    ) => {
        asm!(
            $($zero,)*
            // An operand that a smaller block has no use for must be named all the same.
            "2: /* {c2} */",
            $($step,)*
            "add {a}, {a_step}",
            "add {a2}, {a_step}",
            "add {b}, {b_step}",
            "dec {n}",
            "jnz 2b",
            $($store,)*
            a = inout(reg) $call.a => _,
            a2 = inout(reg) $call.a.wrapping_add(SIDE * $call.a_row) => _,
            b = inout(reg) $call.b => _,
            n = inout(reg) $call.depth.div_ceil(STEP) => _,
            a_row = in(reg) 2 * $call.a_row,
            a_step = in(reg) 2 * $call.a_step,
            b_row = in(reg) 2 * $call.b_step,
            b_step = in(reg) 2 * $call.b_step * (STEP / 2),
            c = in(reg) $to,
            c2 = in(reg) $to.wrapping_add(SIDE * $stride),
            c_row = in(reg) 4 * $stride,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// Up to 32 × 32 sums.
///
/// # Safety
/// As for `Multiply`, and [`has`] said yes.
pub(super) unsafe fn tiles(call: &Call<Bf16>) {
    let whole = call.cols.is_multiple_of(SIDE);
    if whole && !call.add {
        // SAFETY: the caller's promise.
        return unsafe { compute(call, call.c, call.c_stride) };
    }
    let mut sums = Sums::new();
    // SAFETY: the caller's promise; there is room for the largest block.
    unsafe { compute(call, sums.start(), 2 * SIDE) };
    // SAFETY: the caller's promise; what is read was stored just now, in whole vectors.
    unsafe { put(call, sums.start()) };
}

/// # Safety
/// As for `Multiply`, with whole vectors of sums at `to`.
unsafe fn compute(call: &Call<Bf16>, to: *mut f32, stride: usize) {
    // SAFETY: the caller's promise: the instructions exist; A has so many rows and B so many columns of
    // whole steps, and at `to` there is room for whole vectors of sums.
    unsafe {
        configure(call.rows);
        match (call.rows > SIDE, call.cols > SIDE) {
            (true, true) => block!(call, to, stride,
            zero ["tilezero tmm0" "tilezero tmm1" "tilezero tmm2" "tilezero tmm3"],
            step [
                "tileloadd tmm4, [{a} + {a_row}]"
                "tileloadd tmm6, [{b} + {b_row}]"
                "tdpbf16ps tmm0, tmm4, tmm6"
                "tileloadd tmm7, [{b} + {b_row} + 64]"
                "tdpbf16ps tmm1, tmm4, tmm7"
                "tileloadd tmm5, [{a2} + {a_row}]"
                "tdpbf16ps tmm2, tmm5, tmm6"
                "tdpbf16ps tmm3, tmm5, tmm7"
            ],
            store [
                "tilestored [{c} + {c_row}], tmm0"
                "tilestored [{c} + {c_row} + 64], tmm1"
                "tilestored [{c2} + {c_row}], tmm2"
                "tilestored [{c2} + {c_row} + 64], tmm3"
            ]),
            (true, false) => block!(call, to, stride,
                zero ["tilezero tmm0" "tilezero tmm2"],
                step [
                    "tileloadd tmm4, [{a} + {a_row}]"
                    "tileloadd tmm6, [{b} + {b_row}]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tileloadd tmm5, [{a2} + {a_row}]"
                    "tdpbf16ps tmm2, tmm5, tmm6"
                ],
                store ["tilestored [{c} + {c_row}], tmm0" "tilestored [{c2} + {c_row}], tmm2"]),
            (false, true) => block!(call, to, stride,
                zero ["tilezero tmm0" "tilezero tmm1"],
                step [
                    "tileloadd tmm4, [{a} + {a_row}]"
                    "tileloadd tmm6, [{b} + {b_row}]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tileloadd tmm7, [{b} + {b_row} + 64]"
                    "tdpbf16ps tmm1, tmm4, tmm7"
                ],
                store ["tilestored [{c} + {c_row}], tmm0" "tilestored [{c} + {c_row} + 64], tmm1"]),
            (false, false) => block!(call, to, stride,
                zero ["tilezero tmm0"],
                step [
                    "tileloadd tmm4, [{a} + {a_row}]"
                    "tileloadd tmm6, [{b} + {b_row}]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                ],
                store ["tilestored [{c} + {c_row}], tmm0"]),
        }
    }
}

/// Sets the sums in memory, or adds to them.
///
/// # Safety
/// As for `Multiply`; as many sums are at `sums`, in rows of two tiles.
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
unsafe fn put(call: &Call<Bf16>, sums: *const f32) {
    for i in 0..call.rows {
        for j in 0..call.cols {
            // SAFETY: the caller's promise; what is not added to need not have been set.
            unsafe {
                let (to, sum) = (call.c.add(i * call.c_stride + j), sums.add(i * 2 * SIDE + j).read());
                to.write(if call.add { to.read() + sum } else { sum });
            }
        }
    }
}

/// As [`tiles`], with the same bits.
///
/// # Safety
/// As for `Multiply`.
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
pub(super) unsafe fn vectors(call: &Call<Bf16>) {
    let mut sums = [0.0f32; 4 * SIDE * SIDE];
    for (i, row) in sums.chunks_exact_mut(2 * SIDE).take(call.rows).enumerate() {
        for (j, sums) in row.as_chunks_mut::<SIDE>().0.iter_mut().enumerate() {
            if j * SIDE >= call.cols {
                continue;
            }
            for step in 0..call.depth.div_ceil(STEP) {
                let b_step = step * (STEP / 2) * call.b_step + 2 * SIDE * j;
                // SAFETY: the caller's promise: whole steps of rows, and of whole vectors of columns.
                unsafe {
                    let a = call.a.add(i * call.a_row + step * call.a_step).cast::<[Bf16; STEP]>();
                    dot(sums, &a.read_unaligned(), call.b.add(b_step), call.b_step);
                }
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { put(call, sums.as_ptr()) };
}

/// One row of a tile.
///
/// # Safety
/// `STEP / 2` groups of `SIDE` pairs are at `b`, `b_step` apart.
#[inline(always)]
unsafe fn dot(sums: &mut [f32; SIDE], a: &[Bf16; STEP], b: *const Bf16, b_step: usize) {
    let mut halves = [[0.0f32; SIDE]; 2];
    for (k, pair) in a.as_chunks::<2>().0.iter().enumerate() {
        // SAFETY: the caller's promise.
        let columns = unsafe { b.add(k * b_step).cast::<[u32; SIDE]>().read_unaligned() };
        let columns = [columns.map(|pair| pair << 16), columns.map(|pair| pair & 0xffff_0000)];
        for ((half, a), columns) in halves.iter_mut().zip(pair).zip(&columns) {
            let a = normal(f32::from_bits(u32::from(a.to_bits()) << 16));
            for (half, column) in half.iter_mut().zip(columns) {
                *half = normal(a.mul_add(normal(f32::from_bits(*column)), *half));
            }
        }
    }
    let [even, odd] = halves;
    for (sum, (even, odd)) in sums.iter_mut().zip(even.iter().zip(&odd)) {
        *sum = normal(*sum + normal(even + odd));
    }
}

/// The number, or zero where it is below the normal ones.
#[inline(always)]
fn normal(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0f32.copysign(x) } else { x }
}
