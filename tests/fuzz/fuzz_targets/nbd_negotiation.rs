//! Arbitrary bytes as all that a client says, from its flags on.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tmem_fuzz::negotiation(data));
