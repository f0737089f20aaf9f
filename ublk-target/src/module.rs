//! Kernel modules: loaded once with modprobe, when what they bring is not there.

use std::env;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use crate::process;
use crate::program::find_program;

/// How often to look for a node after its module is loaded, and how long to wait between.
const LOOKS: u32 = 20;
const LOOK_PERIOD: Duration = Duration::from_millis(50);

/// Loads `module` if `node` is not there, and waits until it is; or says why it does not come.
pub fn ensure(module: &str, node: &str) -> Result<(), String> {
    if Path::new(node).exists() {
        return Ok(());
    }
    let reason = match find_program("modprobe", &env::var_os("PATH").unwrap_or_default()) {
        None => "there is no modprobe in PATH".to_owned(),
        Some(modprobe) => match process::program(&modprobe).arg(module).output() {
            Ok(output) if output.status.success() => format!("{node} did not appear"),
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => error.to_string(),
        },
    };
    for _ in 0..LOOKS {
        if Path::new(node).exists() {
            return Ok(());
        }
        sleep(LOOK_PERIOD);
    }
    Err(reason)
}
