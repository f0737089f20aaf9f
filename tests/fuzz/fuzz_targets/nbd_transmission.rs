//! Arbitrary bytes as a client's requests, after a good negotiation.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tmem_fuzz::transmission(data));
