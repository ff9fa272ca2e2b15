//! What a run costs: parameters, memory and arithmetic, from its shapes.

use caravan_types::cost::{Activations, FP32, STATE, gradient_sums};
use caravan_types::{BatchShape, ModelShape, Precision, UnitId};

/// Memory of one worker, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// The weights: the whole model, while pipelines have one stage.
    pub weights: u64,
    /// Sums of gradients: its own and those that it receives for the slices that it owns.
    pub gradients: u64,
    /// Both moments of the slices that it owns, and master weights that are not the weights.
    pub moments: u64,
    /// What the passes over one micro-batch need.
    pub activations: u64,
}

impl Memory {
    /// Estimates what one of `workers` workers needs. Good to some ten percent: buffers of
    /// the network and the allocator's waste are not in it.
    pub fn estimate(
        model: &ModelShape,
        batch: &BatchShape,
        precision: Precision,
        workers: u32,
        redundancy: u32,
    ) -> Self {
        let parameters = model.parameters();
        let workers = workers.min(batch.lanes).max(1);
        let sums = gradient_sums(batch.lanes.div_ceil(workers));
        let owners = u64::from(redundancy.min(workers));
        let owned = (parameters * owners).div_ceil(u64::from(workers));
        Self {
            weights: precision.bytes() * parameters,
            gradients: FP32 * (parameters * sums + owned * u64::from(workers - 1)),
            moments: owned * if precision == Precision::Fp32 { STATE - FP32 } else { STATE },
            activations: activations(model, batch, precision),
        }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights + self.gradients + self.moments + self.activations
    }
}

/// What the engine's passes over one micro-batch take in a worker that has the whole model.
fn activations(model: &ModelShape, batch: &BatchShape, precision: Precision) -> u64 {
    let part = Activations::new(model, batch, precision);
    u64::from(model.layers) * part.layer + part.shared + part.head
}

/// Parameters of the embedding, one layer, and the final norm with the head.
pub fn parameters_by_unit(model: &ModelShape) -> [u64; 3] {
    [0, 1, model.units() - 1].map(|u| {
        let range = model.unit_range(UnitId(u));
        range.end - range.start
    })
}

/// A number with three digits and an SI prefix: `5.31 M`.
pub fn si(value: f64) -> String {
    scaled(value, 1000.0, ["", "k", "M", "G", "T", "P", "E"]).trim_end().to_owned()
}

/// Bytes with three digits and a binary prefix: `20.3 MiB`.
pub fn bytes(value: u64) -> String {
    scaled(value as f64, 1024.0, ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"])
}

fn scaled(mut value: f64, base: f64, units: [&str; 7]) -> String {
    let mut unit = 0;
    // 999.5 would be shown as 1000 with three digits.
    while value >= 999.5 && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    let decimals = match value {
        v if unit == 0 && v.fract() == 0.0 => 0,
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$} {}", units[unit])
}

/// A whole number with commas: `5,313,792`.
pub fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_shown_with_three_digits() {
        assert_eq!(
            [0.0, 999.0, 999.9, 5_313_792.0, 6.74e9].map(si),
            ["0", "999", "1.00 k", "5.31 M", "6.74 G"]
        );
        assert_eq!([0, 1023, 1 << 20, 15 << 30].map(bytes), ["0 B", "1.00 KiB", "1.00 MiB", "15.0 GiB"]);
        assert_eq!([7, 1234, 1_234_567].map(grouped), ["7", "1,234", "1,234,567"]);
    }

    #[test]
    fn the_memory_of_70b_is_16_bytes_a_parameter_and_is_shared_out() {
        let model = ModelShape::preset("70b").unwrap();
        let batch = BatchShape { lanes: 8, micro_batches: 1, sequences: 1, sequence_length: 4096 };
        let one = Memory::estimate(&model, &batch, Precision::Fp32, 1, 2);
        assert_eq!(one.moments + one.weights, 12 * model.parameters());
        let single = Memory::estimate(&model, &BatchShape { lanes: 1, ..batch }, Precision::Fp32, 1, 1);
        assert_eq!(single.weights + single.gradients + single.moments, 16 * model.parameters());
        let four = Memory::estimate(&model, &batch, Precision::Fp32, 4, 2);
        assert_eq!(four.moments, one.moments / 2);
        assert_eq!(
            Memory::estimate(&model, &batch, Precision::Fp32, 100, 2),
            Memory::estimate(&model, &batch, Precision::Fp32, 8, 2)
        );
    }
}
