//! The configuration as it is in force, for `tmem config`: every key, its value, and where that was said.
//!
//! What is printed is TOML, and as a configuration file it would make the same daemon on this machine.

use std::fmt::{self, Write};

use tmem::WritebackSettings;

use super::written::{Said, Value, Written};
use super::{Files, Machine, RunConfig};
use crate::backing::Permille;
use crate::cli::RunArgs;
use crate::control::DEFAULT_SOCKET;
use crate::exit::Failure;
use crate::size::Size;

impl Files {
    /// All keys, with comments that tell where they come from; or what of the files cannot be.
    pub fn show(&self, machine: &Machine) -> Result<String, Failure> {
        // What is shown is what a daemon would run with.
        let config = RunConfig::new(&RunArgs::default(), None, self, machine)?;
        let mut page = Page { files: self, text: String::new() };
        page.sources();
        page.size(
            "pool-limit",
            |file| &file.pool_limit,
            Some(Size::half_of_ram()),
            config.pool_limit,
        );
        page.key("control", |file| &file.control, Some(quoted(DEFAULT_SOCKET)));
        page.key("swapon", |file| &file.swapon, Some("false".into()));
        page.key("frontend", |file| &file.frontend, Some(quoted("ublk")));
        let nbd = config.nbd.map(|nbd| quoted(format_args!("unix:{}", nbd.path().display())));
        page.key("nbd", |file| &file.nbd, nbd);
        page.key("best-effort", |file| &file.best_effort, Some("false".into()));
        page.section("[backing]");
        page.key("path", |file| &file.backing.path, None);
        let bytes = config.backing.and_then(|backing| backing.bytes).unwrap_or(0);
        page.size("size", |file| &file.backing.size, None, bytes);
        page.key("encrypt", |file| &file.backing.encrypt, Some("true".into()));
        page.key("force", |file| &file.backing.force, Some("false".into()));
        page.section("[writeback]");
        let default = WritebackSettings::default();
        let share = |permille| Some(quoted(Permille(permille)));
        page.key("low", |file| &file.writeback.low, share(default.low_permille));
        page.key("high", |file| &file.writeback.high, share(default.high_permille));
        page.key("rate", |file| &file.writeback.rate, Some(quoted("none")));
        page.key("daily", |file| &file.writeback.daily, Some(quoted("none")));
        page.key("age", |file| &file.writeback.age, Some(quoted("none")));
        page.key("keep", |file| &file.writeback.keep, Some("false".into()));
        page.swaps(config.swaps.iter().map(|swap| swap.bytes));
        Ok(page.text)
    }
}

struct Page<'a> {
    files: &'a Files,
    text: String,
}

impl Page<'_> {
    fn sources(&mut self) {
        for layer in &self.files.layers {
            self.line(format_args!("# {}", layer.source.path.display()));
        }
        if self.files.layers.is_empty() {
            self.line(format_args!("# no configuration file"));
        }
        self.text.push('\n');
    }

    fn section(&mut self, name: &str) {
        self.line(format_args!("\n{name}"));
    }

    fn key<T>(&mut self, key: &str, of: impl Fn(&Written) -> &Value<T>, default: Option<String>) {
        match (self.files.last(of), default) {
            (Some(said), _) => {
                self.line(format_args!("{key} = {}  # {}", said.text(), said.place()));
            }
            (None, Some(default)) => self.line(format_args!("{key} = {default}  # default")),
            (None, None) => self.line(format_args!("#{key} =  # not set")),
        }
    }

    fn size(
        &mut self,
        key: &str,
        of: impl Fn(&Written) -> &Value<Size>,
        default: Option<Size>,
        bytes: u64,
    ) {
        match (self.files.last(of), default) {
            (Some(said), _) => self.line(format_args!(
                "{key} = {}  # {bytes} bytes, {}",
                said.text(),
                said.place()
            )),
            (None, Some(default)) => {
                self.line(format_args!("{key} = {}  # {bytes} bytes, default", quoted(default)))
            }
            (None, None) => self.line(format_args!("#{key} =  # not set")),
        }
    }

    fn swaps(&mut self, bytes: impl Iterator<Item = u64>) {
        let Some(said) = self.files.last(|file| &file.swap) else {
            return self.line(format_args!("\n#[[swap]]  # not set"));
        };
        for (swap, bytes) in said.get().iter().zip(bytes) {
            self.section("[[swap]]");
            let place =
                |start| format!("{}:{}", said.source.path.display(), said.source.line(start));
            self.line(format_args!(
                "size = {}  # {bytes} bytes, {}",
                &said.source.text[swap.size.span()],
                place(swap.size.span().start)
            ));
            match &swap.name {
                Some(name) => self.line(format_args!(
                    "name = {}  # {}",
                    &said.source.text[name.span()],
                    place(name.span().start)
                )),
                None => self.line(format_args!("#name =  # not set")),
            }
        }
        if said.get().is_empty() {
            self.line(format_args!("\n#[[swap]]  # none, {}", said.place()));
        }
    }

    fn line(&mut self, line: fmt::Arguments<'_>) {
        // A string takes everything.
        let _ = writeln!(self.text, "{line}");
    }
}

impl<T> Said<'_, T> {
    /// The value as it is written.
    fn text(&self) -> &str {
        &self.source.text[self.value.span()]
    }

    fn place(&self) -> String {
        format!("{}:{}", self.source.path.display(), self.source.line(self.value.span().start))
    }
}

fn quoted(value: impl fmt::Display) -> String {
    format!("\"{value}\"")
}
