//! The coordinator around its core: gRPC sessions, store, live page, telemetry.
