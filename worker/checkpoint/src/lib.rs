//! Checkpoints: safetensors parts, a manifest with a hash of every file, written aside and renamed.
