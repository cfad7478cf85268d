#![no_main]

cpift_fuzz_driver::fuzz!("adapter");
