//! Millrace kernels.
