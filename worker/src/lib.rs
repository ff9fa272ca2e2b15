//! The worker around its core: coordinator session, fabric, engine thread.
