//! From files to batches: find, deduplicate, tokenise, shard, and sample as a pure function of (seed, step, index).
