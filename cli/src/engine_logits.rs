//! Logits by Caravan's engine in fp64, to compare a conversion with.
//!
//! The model is computed unit by unit, each a stage of its own, so that no more than one unit of
//! a large model has to be in memory. The head is a norm and a product, which are called here.

use caravan_engine::Model;
use caravan_kernels::matmul::{self, Into, View, ViewMut};
use caravan_kernels::{Cpu, Family, rmsnorm};
use caravan_pretrained::{Dtype, PretrainedError, Prompts, Source};
use caravan_types::{MicroBatch, ModelShape, UnitId};

/// The logits of every position of the prompts: rows of `vocab`. Weights are rounded to `dtype`
/// before they are used, where one is given.
///
/// # Errors
/// Where the weights cannot be read, or the engine cannot compute such a model.
pub fn logits(
    source: &dyn Source,
    prompts: &Prompts,
    dtype: Option<Dtype>,
    threads: usize,
) -> Result<Vec<f64>, PretrainedError> {
    let engine = |error: &dyn std::fmt::Display| PretrainedError::Engine(error.to_string());
    let cpu = Cpu::new(threads, Family::best()).map_err(|e| engine(&e))?;
    // Positions beyond the prompts need no table.
    let shape = ModelShape { context: prompts.length as u32, ..source.shape().clone() };
    let mut model = Model::<f64>::new(&shape).map_err(|e| engine(&e))?;
    let layout = model.layout().clone();
    let last = layout.units() - 1;
    let mut stream: Option<Vec<f64>> = None;
    for unit in 0..last {
        let here = read(source, unit, dtype)?;
        let mut weights = vec![&[][..]; layout.units()];
        weights[unit] = &here;
        model.place(unit..unit + 1, false);
        let flight = model.forward(&cpu, &weights, batch(prompts), stream.as_deref(), &|_| false);
        let flight = flight.map_err(|e| engine(&e))?;
        stream = flight.map(|flight| model.output(&flight).to_vec());
    }
    let (here, stream) = (read(source, last, dtype)?, stream.unwrap_or_default());
    let mut normed = vec![0.0; stream.len()];
    let epsilon = f64::from(shape.norm_eps);
    rmsnorm::forward(&cpu, &stream, &here[layout.final_norm.clone()], epsilon, &mut normed);
    let mut logits = vec![0.0; prompts.tokens.len() * layout.vocab];
    let head = View::rows_of(&here[layout.head_weight.clone()], layout.dim);
    let out = ViewMut::rows_of(&mut logits, layout.vocab);
    cpu.install(|| matmul::matmul(&cpu, View::rows_of(&normed, layout.dim), head.t(), out, Into::Set));
    Ok(logits)
}

/// The weights of a unit.
fn read(source: &dyn Source, unit: usize, dtype: Option<Dtype>) -> Result<Vec<f64>, PretrainedError> {
    let range = source.shape().unit_range(UnitId(unit as u32));
    let mut values = vec![0.0; (range.end - range.start) as usize];
    source.read(range.start, &mut values)?;
    if let Some(dtype) = dtype {
        dtype.round(&mut values);
    }
    Ok(values.into_iter().map(f64::from).collect())
}

fn batch(prompts: &Prompts) -> MicroBatch {
    let n = prompts.tokens.len();
    MicroBatch {
        sequences: n / prompts.length,
        length: prompts.length,
        tokens: prompts.tokens.clone(),
        targets: vec![0; n],
        counted: vec![false; n],
        document_start: vec![0; n],
    }
}
