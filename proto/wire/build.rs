//! Compiles the .proto files with protox, so that nobody needs protoc.

use std::error::Error;

const FILES: [&str; 5] = [
    "proto/caravan/v1/coordinator.proto",
    "proto/caravan/v1/dispute.proto",
    "proto/caravan/v1/plan.proto",
    "proto/caravan/v1/session.proto",
    "proto/caravan/v1/status.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(FILES, ["proto"])?;
    // What is sent to many is shared and not copied.
    tonic_prost_build::configure().bytes(".caravan.v1.ToWorker.plan").compile_fds(files)?;
    Ok(())
}
