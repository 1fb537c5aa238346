//! Whatever a client of exec or attach sends, the conversation ends, and without a panic.

#![no_main]

use jiriaf_pilot_fuzz::conversation;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    conversation::remote_command(input);
});
