//! Floating point numbers in JSON, with every bit.
//!
//! JSON has no word for what is not finite, and a loss that is no number is just what somebody
//! will want to read afterwards. A finite number is written as a number (the readers here parse
//! it back to the same bits), any other one as the hexadecimal text of its bits.

use serde::de::{Error, Visitor};
use serde::{Deserializer, Serializer};
use std::fmt;

/// For `#[serde(with = "exact")]`.
///
/// # Errors
/// Where the serialiser fails.
pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    if value.is_finite() {
        serializer.serialize_f64(*value)
    } else {
        serializer.collect_str(&format_args!("{:#018x}", value.to_bits()))
    }
}

/// For `#[serde(with = "exact")]`.
///
/// # Errors
/// Where there is neither a number nor the text of one.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    deserializer.deserialize_any(Exact)
}

struct Exact;

impl Visitor<'_> for Exact {
    type Value = f64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number, or the hexadecimal bits of one that is not finite")
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<f64, E> {
        Ok(value)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<f64, E> {
        Ok(value as f64)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<f64, E> {
        Ok(value as f64)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<f64, E> {
        let bits = text.strip_prefix("0x").and_then(|digits| u64::from_str_radix(digits, 16).ok());
        bits.map(f64::from_bits).ok_or_else(|| E::invalid_value(serde::de::Unexpected::Str(text), &self))
    }
}

/// The same for numbers that may be missing.
pub mod option {
    use super::Exact;
    use serde::de::{Error, Visitor};
    use serde::{Deserializer, Serializer};
    use std::fmt;

    /// For `#[serde(with = "exact::option")]`.
    ///
    /// # Errors
    /// Where the serialiser fails.
    pub fn serialize<S: Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => super::serialize(value, serializer),
            None => serializer.serialize_none(),
        }
    }

    /// For `#[serde(with = "exact::option")]`.
    ///
    /// # Errors
    /// Where there is something else.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
        deserializer.deserialize_option(Maybe)
    }

    struct Maybe;

    impl<'de> Visitor<'de> for Maybe {
        type Value = Option<f64>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            Exact.expecting(f)?;
            f.write_str(", or nothing")
        }

        fn visit_none<E: Error>(self) -> Result<Option<f64>, E> {
            Ok(None)
        }

        fn visit_unit<E: Error>(self) -> Result<Option<f64>, E> {
            Ok(None)
        }

        fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<f64>, D::Error> {
            super::deserialize(deserializer).map(Some)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    #[serde(tag = "kind")]
    enum Tagged {
        One {
            #[serde(with = "crate::exact")]
            value: f64,
            #[serde(with = "crate::exact::option")]
            perhaps: Option<f64>,
        },
    }

    #[test]
    fn every_number_comes_back_with_its_bits_also_from_a_tagged_enum() {
        let odd =
            [f64::NAN, -f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0, 2.0, 0.1 + 0.2, 5e-324, 1e300];
        for value in odd.into_iter().chain([f64::from_bits(0x7ff8_dead_beef_0001)]) {
            for perhaps in [Some(value), None] {
                let text = serde_json::to_string(&Tagged::One { value, perhaps }).unwrap();
                let Tagged::One { value: back, perhaps: maybe } = serde_json::from_str(&text).unwrap();
                assert_eq!(back.to_bits(), value.to_bits(), "{text}");
                assert_eq!(maybe.map(f64::to_bits), perhaps.map(f64::to_bits), "{text}");
            }
        }
        assert!(serde_json::from_str::<Tagged>(r#"{"kind":"One","value":"nan","perhaps":null}"#).is_err());
    }
}
