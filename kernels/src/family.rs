//! Instruction families, and the macro that compiles a loop once for each.

use std::fmt;

/// The instruction family that the kernels use: part of a run's numerics class, since fused
/// and unfused multiply-adds round differently.
///
/// A value of this type is proof that the machine has the family's instructions: the only
/// ways to get one look first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Family(pub(crate) Kind);

/// What a [`Family`] is; private, so that nobody makes one without looking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// With tiles of bf16, beside AVX-512.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// With products of bf16 pairs.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// What AMX computes, on AVX-512's vectors.
    #[cfg(target_arch = "x86_64")]
    AmxOnVectors,
    Portable,
}

impl Family {
    /// The family that runs anywhere: no fused multiply-add.
    pub const PORTABLE: Self = Self(Kind::Portable);

    /// The families that this machine can run, the fastest for [`Bf16`](crate::Bf16) first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512bw");
            let amx = avx2 && avx512 && crate::matmul::has_amx();
            if amx {
                found.push(Self(Kind::Amx));
            }
            if avx2 && avx512 && is_x86_feature_detected!("avx512bf16") {
                found.push(Self(Kind::Avx512Bf16));
            }
            if avx2 && avx512 {
                found.push(Self(Kind::Avx512));
            }
            if avx2 {
                found.push(Self(Kind::Avx2));
            }
            // Slow, and there for who wants the bits of a machine that has the tiles.
            if avx2 && avx512 && !amx {
                found.push(Self(Kind::AmxOnVectors));
            }
        }
        found.push(Self::PORTABLE);
        found
    }

    /// The fastest family of this machine for [`Bf16`](crate::Bf16).
    #[must_use]
    pub fn best_for_bf16() -> Self {
        Self::available().first().copied().unwrap_or(Self::PORTABLE)
    }

    /// The fastest family of this machine for f32 and f64. Of those that are equally fast it is
    /// the one that most machines have.
    #[must_use]
    pub fn best() -> Self {
        match Self::best_for_bf16().0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Amx | Kind::Avx512Bf16 => Self(Kind::Avx512),
            other => Self(other),
        }
    }

    /// The family of that name, where this machine can run it.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::available().into_iter().find(|f| f.name() == name)
    }

    /// Its name, as in a run's numerics class.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Amx | Kind::AmxOnVectors => "amx-bf16",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Bf16 => "avx512-bf16",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            Kind::Portable => "portable",
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Compiles a function over a [`Real`](crate::Real) once for each family and picks by its
/// first argument. The bodies use plain `*` and `+`, which Rust never contracts, so the
/// families differ in speed only.
macro_rules! kernel {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident<$r:ident>($($args:tt)*) $(-> $ret:ty)? $body:block
    ) => {
        kernel! {
            $(#[$meta])*
            $vis fn $name<$r: Real>($($args)*) $(-> $ret)? $body
        }
    };
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident<$r:ident: $bound:ident>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block
    ) => {
        $(#[$meta])*
        #[allow(unsafe_code)]
        $vis fn $name<$r: $crate::$bound>(family: $crate::Family, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body<$r: $crate::$bound>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
            fn avx512<$r: $crate::$bound>($($arg: $ty),*) $(-> $ret)? {
                body($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2<$r: $crate::$bound>($($arg: $ty),*) $(-> $ret)? {
                body($($arg),*)
            }

            match family.0 {
                // SAFETY: a Family of this kind exists only where its features were detected.
                #[cfg(target_arch = "x86_64")]
                $crate::family::Kind::Amx
                | $crate::family::Kind::AmxOnVectors
                | $crate::family::Kind::Avx512Bf16
                | $crate::family::Kind::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::family::Kind::Avx2 => unsafe { avx2($($arg),*) },
                $crate::family::Kind::Portable => body($($arg),*),
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_machine_has_a_family_and_finds_its_own_by_name() {
        let all = Family::available();
        assert_eq!(all.last(), Some(&Family::PORTABLE));
        assert!(all[0] == Family::best_for_bf16() && all.contains(&Family::best()));
        assert!(all.iter().all(|f| Family::named(f.name()) == Some(*f)));
        assert_eq!(Family::named("sse9"), None);
    }
}
