//! SwiGLU (arXiv 2002.05202): a = silu(gate) · up, with gate and up side by side in a row.

use crate::{Cpu, Element, Family, Real};
use rayon::prelude::*;

/// Rows per task.
const ROWS: usize = 32;

/// `out` (rows of `hidden`) from `gate_up` (rows of gate, then up, `hidden` each).
///
/// # Panics
/// Where lengths do not fit.
pub fn forward<E: Element>(cpu: &Cpu, gate_up: &[E], hidden: usize, out: &mut [E]) {
    assert_eq!(gate_up.len(), 2 * out.len());
    let family = cpu.family();
    cpu.install(|| {
        let rows = gate_up.par_chunks(ROWS * 2 * hidden);
        out.par_chunks_mut(ROWS * hidden).zip(rows).for_each(|(out, rows)| {
            forward_rows(family, rows, hidden, out);
        });
    });
}

/// As [`forward`], on this thread alone.
///
/// # Panics
/// Where lengths do not fit.
pub fn forward_rows<E: Element>(family: Family, gate_up: &[E], hidden: usize, out: &mut [E]) {
    assert_eq!(gate_up.len(), 2 * out.len());
    for (out, row) in out.chunks_exact_mut(hidden).zip(gate_up.chunks_exact(2 * hidden)) {
        forward_row(family, row, out);
    }
}

/// Takes `dout` (∂/∂out) and turns it into out itself, which the next gradient needs and
/// which the forward pass did not keep; sets `dgate_up` to ∂/∂gate_up.
///
/// # Panics
/// Where lengths do not fit.
pub fn backward<E: Element>(cpu: &Cpu, dout: &mut [E], gate_up: &[E], hidden: usize, dgate_up: &mut [E]) {
    assert!(gate_up.len() == 2 * dout.len() && dgate_up.len() == gate_up.len());
    let (family, wide) = (cpu.family(), 2 * hidden);
    cpu.install(|| {
        let rows = gate_up.par_chunks(ROWS * wide).zip(dgate_up.par_chunks_mut(ROWS * wide));
        dout.par_chunks_mut(ROWS * hidden).zip(rows).for_each(|(dout, (rows, drows))| {
            backward_rows(family, dout, rows, hidden, drows);
        });
    });
}

/// As [`backward`], on this thread alone.
///
/// # Panics
/// Where lengths do not fit.
pub fn backward_rows<E: Element>(
    family: Family,
    dout: &mut [E],
    gate_up: &[E],
    hidden: usize,
    dgate_up: &mut [E],
) {
    assert!(gate_up.len() == 2 * dout.len() && dgate_up.len() == gate_up.len());
    let rows = gate_up.chunks_exact(2 * hidden).zip(dgate_up.chunks_exact_mut(2 * hidden));
    for (dout, (row, drow)) in dout.chunks_exact_mut(hidden).zip(rows) {
        backward_row(family, dout, row, drow);
    }
}

kernel! {
    fn forward_row<E: Element>(row: &[E], out: &mut [E]) {
        let (gate, up) = row.split_at(out.len());
        for ((out, g), u) in out.iter_mut().zip(gate).zip(up) {
            let g = g.widen();
            *out = E::narrow(g / (E::Sum::ONE + (-g).exp()) * u.widen());
        }
    }
}

kernel! {
    fn backward_row<E: Element>(dout: &mut [E], row: &[E], drow: &mut [E]) {
        let (gate, up) = row.split_at(dout.len());
        let (dgate, dup) = drow.split_at_mut(dout.len());
        for ((d, (g, u)), (dg, du)) in
            dout.iter_mut().zip(gate.iter().zip(up)).zip(dgate.iter_mut().zip(dup))
        {
            // silu'(g) = σ + g·σ·(1 − σ)
            let (g, u, dout) = (g.widen(), u.widen(), d.widen());
            let one = E::Sum::ONE;
            let sigmoid = one / (one + (-g).exp());
            let silu = g / (one + (-g).exp());
            *dg = E::narrow(dout * u * (sigmoid + silu * (one - sigmoid)));
            *du = E::narrow(dout * silu);
            *d = E::narrow(silu * u);
        }
    }
}
