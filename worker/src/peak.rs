//! What this worker could compute at most, measured before it computes anything: what utilisation
//! is a share of.

use caravan_types::{NumericsClass, Peak};
use std::thread;

/// Measures it, in some hundredths of a second; none where this machine cannot compute in that
/// class.
pub async fn measure(numerics: NumericsClass, threads: usize, host: &str) -> Option<Peak> {
    let measured = tokio::task::spawn_blocking(move || caravan_engine::peak(&numerics, threads)).await;
    let thread = measured.ok()??;
    let cores = thread::available_parallelism().map_or(threads, usize::from) as u32;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let (threads, place) = (threads as u32, place(host, &status));
    tracing::info!(gflops = thread / 1e9, threads, cores, place, "measured the peak of a thread");
    Some(Peak { thread, threads, cores, place })
}

/// The host and those of its cores that this process may run on, as Linux lists them: workers that
/// are kept on different cores of a host share none.
fn place(host: &str, status: &str) -> String {
    let cores = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    format!("{host} {}", cores.unwrap_or_default().trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_the_host_and_the_cores_that_may_be_used() {
        let status = "Name:\tcaravan\nCpus_allowed:\t3\nCpus_allowed_list:\t0-1,4\nMems_allowed:\t1\n";
        assert_eq!(place("here", status), "here 0-1,4");
        assert_ne!(place("here", status), place("there", status));
        assert_eq!(place("here", ""), "here ", "without such a list all of a host is one place");
    }
}
