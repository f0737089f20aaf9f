//! `json FIELD...`: prints values of the JSON document on standard input, in one line.
//!
//! FIELD is a path with dots (`pool.frames_free`, `devices.0.name`), or the last part of one that
//! is the only one of its name. A field that is missing or ambiguous is an error, never an empty
//! answer that a comparison could take for a number.

use crate::Outcome;
use std::io::Read;

/// Runs the subcommand.
pub fn run(fields: impl Iterator<Item = String>) -> Outcome {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).map_err(|e| e.to_string())?;
    let values = fields.map(|field| find(&text, &field)).collect::<Result<Vec<_>, _>>()?;
    if values.is_empty() {
        return Err("which field?".to_owned());
    }
    println!("{}", values.join(" "));
    Ok(true)
}

fn find(text: &str, field: &str) -> Result<String, String> {
    let mut parser = Parser { rest: text, leaves: Vec::new() };
    parser.value("")?;
    parser.space();
    if !parser.rest.is_empty() {
        return Err(format!("there is more after the document: {:.20}", parser.rest));
    }
    let mut leaves = parser.leaves;
    if let Some(at) = leaves.iter().position(|(path, _)| path == field) {
        return Ok(leaves.swap_remove(at).1);
    }
    let suffix = format!(".{field}");
    leaves.retain(|(path, _)| path.ends_with(&suffix));
    match leaves.len() {
        1 => Ok(leaves.swap_remove(0).1),
        0 => Err(format!("no field {field}")),
        _ => Err(format!(
            "{field} may be {}",
            leaves.iter().map(|(p, _)| &p[..]).collect::<Vec<_>>().join(" or ")
        )),
    }
}

/// Collects the paths and texts of all values that are not objects or arrays.
struct Parser<'a> {
    rest: &'a str,
    leaves: Vec<(String, String)>,
}

impl Parser<'_> {
    fn space(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn eat(&mut self, token: char) -> bool {
        self.space();
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn expect(&mut self, token: char) -> Result<(), String> {
        match self.eat(token) {
            true => Ok(()),
            false => Err(format!("expected {token:?} before {:.20?}", self.rest)),
        }
    }

    fn value(&mut self, path: &str) -> Result<(), String> {
        let join = |name: &str| match path {
            "" => name.to_owned(),
            _ => format!("{path}.{name}"),
        };
        if self.eat('{') {
            if self.eat('}') {
                return Ok(());
            }
            loop {
                let name = self.string()?;
                self.expect(':')?;
                self.value(&join(&name))?;
                if !self.eat(',') {
                    return self.expect('}');
                }
            }
        }
        if self.eat('[') {
            if self.eat(']') {
                return Ok(());
            }
            for index in 0.. {
                self.value(&join(&index.to_string()))?;
                if !self.eat(',') {
                    break;
                }
            }
            return self.expect(']');
        }
        let text = match self.rest.starts_with('"') {
            true => self.string()?,
            false => self.word()?,
        };
        self.leaves.push((path.to_owned(), text));
        Ok(())
    }

    fn string(&mut self) -> Result<String, String> {
        self.expect('"')?;
        let mut text = String::new();
        let mut chars = self.rest.char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                '"' => {
                    self.rest = &self.rest[at + 1..];
                    return Ok(text);
                }
                '\\' => match chars.next() {
                    Some((_, 'n')) => text.push('\n'),
                    Some((_, 't')) => text.push('\t'),
                    Some((_, c @ ('"' | '\\' | '/'))) => text.push(c),
                    _ => return Err("an escape that is not read here".to_owned()),
                },
                c => text.push(c),
            }
        }
        Err("a string without an end".to_owned())
    }

    fn word(&mut self) -> Result<String, String> {
        let end = self
            .rest
            .find(|c: char| !(c.is_ascii_alphanumeric() || "+-.".contains(c)))
            .unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        let known = matches!(word, "true" | "false" | "null");
        if !known && word.parse::<f64>().is_err() {
            return Err(format!("{word:?} is no value"));
        }
        self.rest = rest;
        Ok(word.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::find;

    const TEXT: &str = r#" { "pool": {"free": 12, "limit": 34.5, "x": []},
        "devices": [ {"name": "a \"b\"", "used": 1}, {"name": "c", "used": true} ] } "#;

    #[test]
    fn finds_paths_and_unique_names() {
        assert_eq!(find(TEXT, "pool.free").as_deref(), Ok("12"));
        assert_eq!(find(TEXT, "limit").as_deref(), Ok("34.5"));
        assert_eq!(find(TEXT, "devices.0.name").as_deref(), Ok("a \"b\""));
        assert_eq!(find(TEXT, "devices.1.used").as_deref(), Ok("true"));
    }

    #[test]
    fn missing_ambiguous_and_broken_are_errors() {
        for (text, field) in [
            (TEXT, "fre"),
            (TEXT, "name"),
            (TEXT, "pool"),
            ("", "a"),
            ("{\"a\": 1", "a"),
            ("{\"a\": x}", "a"),
            ("{\"a\": 1} 2", "a"),
        ] {
            assert!(find(text, field).is_err(), "{text} {field}");
        }
    }
}
