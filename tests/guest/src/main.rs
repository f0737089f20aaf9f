//! `tmem-guest`: the programs that the test machines of `scripts/vm` run.
//!
//! * `pressure` fills more memory than there is and verifies every page of it;
//! * `touch` measures how long a page takes that is swapped out, and verifies it;
//! * `device` writes and verifies the pages of a block device;
//! * `lines` writes text to be sorted;
//! * `heartbeat` measures how long the machine did not answer;
//! * `watchdog` makes the kernel tell what it waits for before the machine is given up;
//! * `kill` kills a process again and again, and measures how long it takes until another has its place;
//! * `hangup` shuts down a process's nameless sockets;
//! * `hold` stops a thread, and leaves the rest of its process running;
//! * `pause` runs a command while a block device is read, and measures how long reads stood still;
//! * `json` takes values out of a JSON document, for scripts without jq.
//!
//! Linked statically, so that it needs nothing of the machine that it runs on. Exit status: 0 when
//! all is well, 1 when a check failed, 2 for a wrong command line or a refused system call.

mod args;
mod checked;
mod device;
mod hangup;
mod heartbeat;
mod hold;
mod json;
mod kill;
mod lines;
mod memory;
mod pattern;
mod pause;
mod pressure;
mod touch;

use std::process::ExitCode;

const USAGE: &str = "\
usage: tmem-guest pressure --memory SIZE|N% [--hot FRACTION] [--passes N | --seconds S | --while FILE]
                           [--seed N] [--fill heap=60,same=10,text=15,random=15]
                           [--touches MULTIPLE] [--until FILE]
       tmem-guest touch --memory SIZE|N% --touches N [--hot FRACTION] [--seed N]
                        [--fill heap=60,same=10,text=15,random=15]
       tmem-guest device --path DEVICE --pages N --write VERSION|--read VERSION [--request PAGES]
                         [--seed N] [--fill heap=60,same=10,text=15,random=15]
       tmem-guest lines --count N [--seed N]
       tmem-guest heartbeat [--log FILE]
       tmem-guest watchdog --after SECONDS
       tmem-guest kill --name NAME --while NAME [--count N] [--signal N] [--least MS] [--most MS] [--seed N]
       tmem-guest hangup --name NAME
       tmem-guest hold --name NAME --thread NAME
       tmem-guest pause --path DEVICE --run COMMAND [--count N] [--pages N]
       tmem-guest json FIELD... < DOCUMENT";

/// What a subcommand ends with: `Ok(false)` is a failed check.
type Outcome = Result<bool, String>;

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let command = words.next().unwrap_or_default();
    let outcome = match command.as_str() {
        "pressure" => args::parse(words).and_then(pressure::run),
        "touch" => args::parse(words).and_then(touch::run),
        "device" => args::parse(words).and_then(device::run),
        "lines" => args::parse(words).and_then(lines::run),
        "heartbeat" => args::parse(words).and_then(heartbeat::heartbeat),
        "watchdog" => args::parse(words).and_then(heartbeat::watchdog),
        "kill" => args::parse(words).and_then(kill::run),
        "hangup" => args::parse(words).and_then(hangup::run),
        "hold" => args::parse(words).and_then(hold::run),
        "pause" => args::parse(words).and_then(pause::run),
        "json" => json::run(words),
        _ => Err(format!("unknown command {command:?}\n{USAGE}")),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(message) => {
            eprintln!("tmem-guest {command}: {message}");
            ExitCode::from(2)
        }
    }
}
