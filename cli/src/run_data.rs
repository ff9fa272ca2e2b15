//! The data of a run that was started before, as its sampler reads it.

use crate::Failure;
use crate::run_dir::RunDir;
use caravan_data::{Dataset, Sampler};
use caravan_types::Digest;
use std::path::PathBuf;
use std::sync::Arc;

/// Why a run's data cannot be used.
#[derive(Debug, thiserror::Error)]
enum RunDataError {
    #[error(
        "{} holds other data than the run was started with (hash {found}, not {expected}): train once more with the \
         run's data, or restore that folder",
        dir.display()
    )]
    OtherData { dir: PathBuf, expected: Digest, found: Digest },
}

/// Opens the data of a run.
///
/// # Errors
/// Where it is not there, damaged, or not what the run was started with.
pub fn sampler(run: &RunDir) -> Result<Sampler, Failure> {
    let spec = run.spec();
    let dir = run.data()?;
    let data = Dataset::open(&dir)?;
    if data.spec() != spec.data {
        let (expected, found) = (spec.data.digest, data.spec().digest);
        return Err(RunDataError::OtherData { dir, expected, found }.into());
    }
    Ok(Sampler::new(Arc::new(data), spec.seed, spec.batch)?)
}
