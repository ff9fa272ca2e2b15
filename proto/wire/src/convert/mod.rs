//! Conversions between the messages of the .proto files and the types, one module for each
//! file. Out by `From`, which cannot fail; in by `TryFrom`, which checks.

mod dispute;
mod plan;
mod session;
mod status;

/// Both ways between an enum of the types and one of the .proto files, whose value 0 (not
/// set) and unknown values are refused.
macro_rules! variants {
    ($types:ty, $wire:ty, $name:ident, [$($variant:ident),+ $(,)?]) => {
        impl From<$types> for $wire {
            fn from(value: $types) -> Self {
                match value {
                    $(<$types>::$variant => Self::$variant,)+
                }
            }
        }

        /// The variant that a field's number means.
        pub(super) fn $name(
            value: i32,
            field: &'static str,
        ) -> Result<$types, crate::error::Malformed> {
            match <$wire>::try_from(value) {
                $(Ok(<$wire>::$variant) => Ok(<$types>::$variant),)+
                Ok(<$wire>::Unspecified) | Err(_) => {
                    Err(crate::error::Why::UnknownVariant(value).at(field))
                }
            }
        }
    };
}
use variants;

#[cfg(test)]
mod tests;
