//! What a run costs: parameters, memory and arithmetic, from its shapes.

use caravan_types::{ModelShape, UnitId};

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
}
