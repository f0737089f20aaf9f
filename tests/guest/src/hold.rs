//! `hold`: stops one thread of a process, which a signal cannot do, until the process is killed.
//!
//! It says `held` when the thread has stopped, and `hold: gone` when it has ended.

use crate::Outcome;
use crate::args::Args;
use crate::kill;
use std::fs;
use std::io;

/// Runs the subcommand.
pub fn run(mut args: Args) -> Outcome {
    let name = args.text("name").ok_or("whose? --name NAME")?;
    let thread = args.text("thread").ok_or("which? --thread NAME")?;
    args.finish()?;
    let process = kill::find(&name, None).ok_or_else(|| format!("there is no {name}"))?;
    let tid = find_thread(process, &thread)
        .ok_or_else(|| format!("{name} ({process}) has no thread {thread}"))?;
    stop(tid).map_err(|error| format!("thread {tid} is not stopped: {error}"))?;
    println!("held");
    wait_for_end(tid).map_err(|error| format!("cannot wait for thread {tid}: {error}"))?;
    println!("hold: gone");
    Ok(true)
}

fn find_thread(process: i32, name: &str) -> Option<i32> {
    let tids = fs::read_dir(format!("/proc/{process}/task")).ok()?;
    tids.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).find(|tid| {
        let comm = fs::read_to_string(format!("/proc/{process}/task/{tid}/comm"));
        comm.is_ok_and(|comm| comm.trim_end() == name)
    })
}

/// Stops a thread, as a debugger does.
fn stop(tid: i32) -> io::Result<()> {
    for request in [libc::PTRACE_SEIZE, libc::PTRACE_INTERRUPT] {
        // SAFETY: these requests have no memory of ours.
        if unsafe { libc::ptrace(request, tid, 0, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    match wait(tid)? {
        status if libc::WIFSTOPPED(status) => Ok(()),
        _ => Err(io::Error::other("it has ended")),
    }
}

fn wait_for_end(tid: i32) -> io::Result<()> {
    // Stopped once more, it stays so.
    while libc::WIFSTOPPED(wait(tid)?) {}
    Ok(())
}

fn wait(tid: i32) -> io::Result<i32> {
    let mut status = 0;
    // SAFETY: the call writes the status.
    match unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(status),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_thread_is_stopped_until_its_process_is_killed() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let pid = child.id() as i32;
        let state = || {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
        };
        assert_eq!(find_thread(pid, "no thread has such a name"), None);
        let stopped = stop(pid);
        let held = stopped.is_ok().then(state);
        child.kill().unwrap();
        if stopped.is_ok() {
            wait_for_end(pid).unwrap();
            assert_eq!(held, Some('t'));
        }
        drop(child.wait());
        stopped.unwrap();
    }
}
