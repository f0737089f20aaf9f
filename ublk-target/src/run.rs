//! `tmem run`: the daemon's life in the main thread, from its first signal handler to its last
//! word.
//!
//! Once a device is in use the process must not end before it is out of use again: whoever waits
//! for a page would wait for ever. So signals are only noted, from before the daemon starts until
//! after it has stopped; and a stop that is refused, because somebody uses a device, leaves the
//! daemon serving. It is tried again until it succeeds: at a system's shutdown others take their
//! swap out of use at the same time as we, and nobody sends a second signal but the one that kills.

use std::io::{self, Write};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::config::RunConfig;
use crate::control::{Operations, Server};
use crate::exit::{Exit, Failure};
use crate::log::log;
use crate::notify;
use crate::socket::Listener;
use crate::watchdog::{Watchdog, Watched};

/// How soon a stop that was refused is tried again. The wait doubles each time, up to
/// [`RETRY_MAX`]: a swapoff that fails for want of memory is work for the whole machine.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(32);

/// How often the main thread looks for signals while it waits for something else.
const LOOK_PERIOD: Duration = Duration::from_millis(100);

/// A daemon that has started.
pub trait Service: Operations + Watched {
    /// Takes every device out of use, removes it, and ends the daemon's threads. If that cannot be
    /// done, everything that could not be removed goes on as before, and the error says why and
    /// what to do.
    fn shutdown(&self) -> Result<(), Failure>;

    /// How much is swapped to its devices, in bytes.
    fn swapped(&self) -> u64;
}

/// Runs the daemon that `start` starts until it is told to stop and has stopped. Each device is
/// reported on `out` as a line `NAME PATH BYTES` as soon as it is there.
pub fn run<S: Service + 'static>(
    config: &RunConfig,
    start: impl FnOnce(&RunConfig) -> Result<S, Failure>,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGQUIT])
        .map_err(|error| system("handle signals", &error))?;
    // First of all, for it tells whether there is a daemon already.
    let listener = Listener::bind(&config.control, "--control")?;
    let service = Arc::new(start(config)?);
    let server = match Server::start(listener, service.clone()) {
        Ok(server) => server,
        Err(error) => {
            service.shutdown()?;
            return Err(system("start the control threads", &error));
        }
    };
    let watchdog = Watchdog::start(service.clone());
    let added = add_devices(config, &*service, &mut signals, out);
    match &added {
        Ok(Added::All) => {
            notify::ready(&format!("serving {} devices", config.swaps.len()));
            wait(&mut signals);
        }
        Ok(Added::UntilASignal) => log("stopping on a signal"),
        Err(failure) => log(format_args!("stopping: {failure}")),
    }
    stop(&service, &mut signals);
    server.stop();
    // Until just now a client could still add a device. Usually none has, and this does nothing.
    stop(&service, &mut signals);
    drop(watchdog);
    added.map(|_| ())
}

/// How far the adding of devices went.
enum Added {
    /// All are there.
    All,
    /// A signal came before the last one.
    UntilASignal,
}

/// Adds the devices that the daemon shall start with, until a signal says that it shall stop.
fn add_devices(
    config: &RunConfig,
    service: &dyn Operations,
    signals: &mut Signals,
    out: &mut dyn Write,
) -> Result<Added, Failure> {
    for swap in &config.swaps {
        if signals.pending().next().is_some() {
            return Ok(Added::UntilASignal);
        }
        let info = service.add_swap(swap.name.as_deref(), swap.bytes)?;
        let line = format!("{} {} {}", info.name, info.path, info.bytes);
        if let Err(error) = writeln!(out, "{line}").and_then(|()| out.flush()) {
            log(format_args!("cannot report '{line}': {error}"));
        }
    }
    Ok(Added::All)
}

/// Waits for a signal that asks the daemon to stop.
fn wait(signals: &mut Signals) {
    let signal = signals.forever().next();
    let name = signal.and_then(signal_hook::low_level::signal_name).unwrap_or("a signal");
    log(format_args!("stopping on {name}"));
}

/// Stops the daemon, however often that has to be tried.
fn stop<S: Service + 'static>(service: &Arc<S>, signals: &mut Signals) {
    let swapping = Arc::clone(service);
    let _patience = notify::stopping(move || swapping.swapped());
    let mut said = String::new();
    let mut delay = RETRY_FIRST;
    while let Err(failure) = service.shutdown() {
        let message = format!("still running: {failure}");
        if message != said {
            log(&message);
            notify::status(&message);
            said = message;
        }
        // Signals that came meanwhile asked for what has just been tried.
        let _ = signals.pending().count();
        wait_at_most(signals, delay);
        delay = (delay * 2).min(RETRY_MAX);
    }
}

/// Waits until a signal comes, but not longer than `limit`.
fn wait_at_most(signals: &mut Signals, limit: Duration) {
    let end = Instant::now() + limit;
    while signals.pending().next().is_none() && Instant::now() < end {
        thread::sleep(LOOK_PERIOD);
    }
}

/// A system call that failed.
fn system(action: &str, error: &io::Error) -> Failure {
    Failure::new(Exit::Failure, format!("cannot {action}: {error}"))
}
