//! One operation a file, with a fixed reduction order: the CPU bodies of Caravan's transformer kernels.
