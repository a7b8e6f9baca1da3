//! Reads the kernels' signatures, for build.rs: each one becomes entry points in C and a struct in Rust whose fields are
//! the arguments, so that a launch with another type, number or order of arguments does not compile.
//!
//! ```c
//! template <class T, int D>
//! KERNEL(128) attention(const T *q, float *lse, unsigned rows) { ... }
//! INSTANCES(attention, (float, 64), (bf16, 64))
//! ```
//! Without `INSTANCES` a template over one class is made for `float` and `bf16`.

use std::fmt::Write;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Parameter {
    pub name: String,
    /// Of what a pointer points to, or of the value.
    pub element: String,
    pub pointer: bool,
    pub constant: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Signature {
    pub name: String,
    /// `__launch_bounds__`: threads of a block, then whatever else was given.
    pub bounds: String,
    /// Template parameters: `(class?, name)`.
    pub template: Vec<(bool, String)>,
    pub parameters: Vec<Parameter>,
    /// Arguments of the template, instance by instance.
    pub instances: Vec<Vec<String>>,
}

/// The kernels of one file, in order. Fails with what is wrong where.
pub fn signatures(source: &str) -> Result<Vec<Signature>, String> {
    let code = without_comments(source);
    let mut found = Vec::new();
    for (at, _) in
        code.match_indices("KERNEL(").filter(|(at, _)| starts_a_word(&code, *at) && !in_directive(&code, *at))
    {
        let line = code[..at].matches('\n').count() + 1;
        found.push(signature(&code, at).map_err(|what| format!("line {line}: {what}"))?);
    }
    Ok(found)
}

fn signature(code: &str, at: usize) -> Result<Signature, String> {
    let (bounds, rest) = parenthesized(&code[at + "KERNEL".len()..])?;
    let open = rest.find('(').ok_or("a kernel has an argument list")?;
    let name = rest[..open].trim().to_string();
    let (arguments, _) = parenthesized(&rest[open..])?;
    let template = template_before(&code[..at])?;
    let parameters = split(arguments).into_iter().map(parameter).collect::<Result<_, _>>()?;
    let instances = instances(code, &name, &template)?;
    Ok(Signature { name, bounds: bounds.trim().to_string(), template, parameters, instances })
}

/// `(class?, name)` of each parameter of the `template <...>` that ends the text, if one does.
fn template_before(code: &str) -> Result<Vec<(bool, String)>, String> {
    let Some(list) = code.trim_end().strip_suffix('>').and_then(|code| Some(&code[code.rfind("template <")? + 10..]))
    else {
        return Ok(Vec::new());
    };
    let one = |text: &str| match text.trim().split_once(' ') {
        Some(("class", name)) => Ok((true, name.trim().to_string())),
        Some(("int", name)) => Ok((false, name.trim().to_string())),
        _ => Err(format!("template parameter `{text}`: expected `class NAME` or `int NAME`")),
    };
    split(list).into_iter().map(one).collect()
}

fn instances(code: &str, name: &str, template: &[(bool, String)]) -> Result<Vec<Vec<String>>, String> {
    let lists: Vec<&str> = code
        .match_indices("INSTANCES(")
        .filter(|(at, _)| !in_directive(code, *at))
        .map(|(at, _)| parenthesized(&code[at + "INSTANCES".len()..]).map(|(list, _)| list))
        .collect::<Result<_, _>>()?;
    let ours = lists.iter().find_map(|list| list.trim().strip_prefix(name)?.trim().strip_prefix(','));
    let made: Vec<Vec<String>> = match (ours, template) {
        (Some(list), _) => {
            let tuple = |text: &str| {
                parenthesized(text.trim()).map(|(t, _)| split(t).iter().map(|a| a.trim().into()).collect())
            };
            split(list).into_iter().map(tuple).collect::<Result<_, _>>()?
        }
        (None, []) => vec![Vec::new()],
        (None, [(true, _)]) => vec![vec!["float".into()], vec!["bf16".into()]],
        (None, _) => return Err(format!("{name} has no INSTANCES")),
    };
    match made.iter().find(|instance| instance.len() != template.len()) {
        Some(bad) => {
            Err(format!("{name}: an instance of {} arguments, the template has {}", bad.len(), template.len()))
        }
        None => Ok(made),
    }
}

fn parameter(text: &str) -> Result<Parameter, String> {
    let clean = text.replace("__restrict__", " ").replace('*', " * ");
    let words: Vec<&str> = clean.split_whitespace().collect();
    let constant = words.first() == Some(&"const");
    let words = &words[usize::from(constant)..];
    let (name, kind) = words.split_last().ok_or("an argument is empty")?;
    let (pointer, element) = match kind.split_last() {
        Some((&"*", element)) => (true, element.join(" ")),
        _ => (false, kind.join(" ")),
    };
    if element.is_empty() || name.contains('*') || (constant && !pointer) {
        return Err(format!("argument `{}`: expected `[const] TYPE [*]NAME`, const with pointers only", text.trim()));
    }
    Ok(Parameter { name: name.to_string(), element, pointer, constant })
}

/// What stands between the first parenthesis and the one that closes it, and what follows.
fn parenthesized(text: &str) -> Result<(&str, &str), String> {
    let open = text.find('(').ok_or("expected a parenthesis")?;
    let mut depth = 0;
    for (at, c) in text[open..].char_indices() {
        depth += i32::from(c == '(') - i32::from(c == ')');
        if depth == 0 {
            return Ok((&text[open + 1..open + at], &text[open + at + 1..]));
        }
    }
    Err("a parenthesis is not closed".into())
}

/// At the commas outside parentheses.
fn split(text: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0, 0);
    for (at, c) in text.char_indices() {
        depth += i32::from(c == '(') - i32::from(c == ')');
        if c == ',' && depth == 0 {
            parts.push(&text[start..at]);
            start = at + 1;
        }
    }
    parts.push(&text[start..]);
    parts.retain(|part| !part.trim().is_empty());
    parts
}

fn starts_a_word(code: &str, at: usize) -> bool {
    !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_')
}

fn in_directive(code: &str, at: usize) -> bool {
    code[..at].lines().last().is_some_and(|line| line.trim_start().starts_with('#')) && !code[..at].ends_with('\n')
}

/// The text with comments blanked out, line for line.
fn without_comments(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while !rest.is_empty() {
        let comment = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else {
            0
        };
        out.extend(rest[..comment].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        rest = &rest[comment..];
        if let Some(c) = rest.chars().next().filter(|_| comment == 0) {
            out.push(c);
            rest = &rest[c.len_utf8()..];
        }
    }
    out
}

impl Signature {
    /// Name of an instance's entry point: what a profiler shows.
    pub fn entry(&self, instance: &[String]) -> String {
        let short = |argument: &String| if argument == "float" { "f32".to_string() } else { argument.clone() };
        std::iter::once(format!("cuvee_{}", self.name)).chain(instance.iter().map(short)).collect::<Vec<_>>().join("_")
    }

    /// Threads of a block.
    pub fn threads(&self) -> &str {
        self.bounds.split(',').next().unwrap_or_default().trim()
    }

    /// Entry points without mangled names. Rust's borrows make `__restrict__` true.
    pub fn wrappers(&self) -> String {
        let mut out = String::new();
        for instance in &self.instances {
            let actual = |element: &str| {
                let formal = self.template.iter().position(|(_, name)| name == element);
                formal.map_or(element.to_string(), |i| instance[i].clone())
            };
            let declare = |p: &Parameter| {
                let (constant, star) =
                    (if p.constant { "const " } else { "" }, if p.pointer { " *__restrict__" } else { "" });
                format!("{constant}{}{star} {}", actual(&p.element), p.name)
            };
            let declared: Vec<String> = self.parameters.iter().map(declare).collect();
            let names: Vec<&str> = self.parameters.iter().map(|p| p.name.as_str()).collect();
            let arguments = if instance.is_empty() { String::new() } else { format!("<{}>", instance.join(", ")) };
            let _ = writeln!(
                out,
                "extern \"C\" __global__ void __launch_bounds__({}) {}({}) {{ {}{arguments}({}); }}",
                self.bounds,
                self.entry(instance),
                declared.join(", "),
                self.name,
                names.join(", ")
            );
        }
        out
    }

    /// The Rust struct whose fields are the arguments; `first` is the index of the first instance among all entries.
    pub fn launcher(&self, first: usize) -> Result<String, String> {
        let classes: Vec<&str> =
            self.template.iter().filter(|(class, _)| *class).map(|(_, name)| name.as_str()).collect();
        let numbers: Vec<String> =
            self.template.iter().filter(|(class, _)| !class).map(|(_, name)| name.to_lowercase()).collect();
        let mut fields: Vec<(String, String)> = numbers.iter().map(|name| (name.clone(), "u32".into())).collect();
        for p in &self.parameters {
            let element =
                rust_type(&p.element, &classes).ok_or(format!("{}: no Rust type for `{}`", self.name, p.element))?;
            let kind = match (p.pointer, p.constant) {
                (true, true) => format!("In<'a, {element}>"),
                (true, false) => format!("Out<'a, {element}>"),
                (false, _) => element,
            };
            fields.push((p.name.clone(), kind));
        }
        let camel: String = self.name.split('_').map(|w| w[..1].to_uppercase() + &w[1..]).collect();
        let bounds: String = classes.iter().map(|name| format!(", {name}: Element")).collect();
        let names: String = classes.iter().map(|name| format!(", {name}")).collect();
        let declared: String = fields.iter().map(|(name, kind)| format!("    pub {name}: {kind},\n")).collect();
        let key: Vec<String> = self
            .template
            .iter()
            .map(|(class, name)| if *class { format!("{name}::NAME") } else { format!("self.{}", name.to_lowercase()) })
            .collect();
        let arm = |(i, instance): (usize, &Vec<String>)| {
            let one = |a: &String| match a.as_str() {
                "float" => "\"f32\"".to_string(),
                "bf16" => "\"bf16\"".to_string(),
                number => number.to_string(),
            };
            let pattern = instance.iter().map(one).map(|p| p + ",").collect::<String>();
            format!("            ({pattern}) => {},\n", first + i)
        };
        let arms: String = self.instances.iter().enumerate().map(arm).collect();
        let key: String = key.iter().map(|k| k.clone() + ",").collect();
        let entry = match self.template.is_empty() {
            true => first.to_string(),
            false => {
                let other = format!("            other => return Err(cuda.no_instance({:?}, &other)),\n", self.name);
                format!("match ({key}) {{\n{arms}{other}        }}")
            }
        };
        let arguments: String = self.parameters.iter().map(|p| format!("argument(&self.{}), ", p.name)).collect();
        let numbers: Vec<&str> = self.parameters.iter().filter(|p| !p.pointer).map(|p| p.name.as_str()).collect();
        let (formats, values): (Vec<String>, Vec<String>) =
            numbers.iter().map(|name| (format!("{name} {{}}"), format!(", self.{name}"))).unzip();
        let describe = format!("format!(\"{}\"{})", formats.join(", "), values.concat());
        Ok(format!(
            "pub struct {camel}<'a{bounds}> {{\n{declared}}}\n\
             impl<'a{bounds}> {camel}<'a{names}> {{\n    pub const THREADS: u32 = {threads};\n\
             \x20   pub fn launch(self, cuda: &Cuda, grid: impl Into<Grid>) -> Result<()> {{\n\
             \x20       let entry = {entry};\n\
             \x20       let describe = || {describe};\n\
             \x20       cuda.launch(entry, grid.into(), Self::THREADS, &mut [{arguments}], &describe)\n    }}\n}}\n",
            threads = self.threads(),
        ))
    }
}

fn rust_type(element: &str, classes: &[&str]) -> Option<String> {
    Some(match element {
        "float" => "f32".into(),
        "bf16" => "bf16".into(),
        "unsigned" => "u32".into(),
        "int" => "i32".into(),
        "unsigned long long" => "u64".into(),
        class if classes.contains(&class) => class.into(),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "
#define KERNEL(...) nothing
template <class T> struct Pack {};
// KERNEL(1) commented(T *x)
template <class T, class O, int WIDE>
KERNEL(128, 2) mixed_up(const T *x, O *__restrict__ y, const unsigned* index, unsigned rows, float eps) { (void)rows; }
INSTANCES(mixed_up, (float, float, 64), (bf16, float, 0))
KERNEL(64) plain(float *sum, unsigned long long n) {}
";

    #[test]
    fn signatures_are_read() {
        let [mixed, plain] = &signatures(TEXT).unwrap()[..] else { panic!() };
        assert_eq!((mixed.name.as_str(), mixed.bounds.as_str(), mixed.threads()), ("mixed_up", "128, 2", "128"));
        assert_eq!(mixed.instances, [["float", "float", "64"], ["bf16", "float", "0"]]);
        let y = &mixed.parameters[1];
        assert_eq!((y.name.as_str(), y.element.as_str(), y.pointer, y.constant), ("y", "O", true, false));
        assert_eq!(mixed.parameters[2].element, "unsigned");
        assert_eq!((plain.parameters[1].element.as_str(), plain.parameters[1].pointer), ("unsigned long long", false));
        assert_eq!(plain.instances, [[""; 0]]);
    }

    #[test]
    fn each_instance_gets_an_entry_point() {
        let [mixed, plain] = &signatures(TEXT).unwrap()[..] else { panic!() };
        let wrappers = mixed.wrappers();
        let second = "cuvee_mixed_up_bf16_f32_0(const bf16 *__restrict__ x, float *__restrict__ y, const unsigned *__restrict__ index, unsigned rows, float eps) { mixed_up<bf16, float, 0>(x, y, index, rows, eps); }";
        assert!(wrappers.contains("__launch_bounds__(128, 2) cuvee_mixed_up_f32_f32_64("), "{wrappers}");
        assert!(wrappers.contains(second), "{wrappers}");
        assert!(plain.wrappers().contains("{ plain(sum, n); }"));
    }

    #[test]
    fn the_struct_has_the_arguments_types() {
        let [mixed, plain] = &signatures(TEXT).unwrap()[..] else { panic!() };
        let text = mixed.launcher(5).unwrap();
        for line in [
            "pub struct MixedUp<'a, T: Element, O: Element> {",
            "pub wide: u32,",
            "pub x: In<'a, T>,",
            "pub y: Out<'a, O>,",
            "pub index: In<'a, u32>,",
            "(\"bf16\",\"f32\",0,) => 6,",
            "pub eps: f32,",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
        assert!(plain.launcher(0).unwrap().contains("pub n: u64,"));
    }

    #[test]
    fn what_cannot_be_read_is_said() {
        for (text, expected) in [
            ("KERNEL(1) f(double x, const float y) {}", "line 1: argument `const float y`"),
            ("template <class T, int N>\nKERNEL(1) f(T *x) {}", "line 2: f has no INSTANCES"),
            ("template <class T>\nKERNEL(1) f(T *x) {}\nINSTANCES(f, (float, 3))", "an instance of 2 arguments"),
            ("template <typename T>\nKERNEL(1) f(T *x) {}", "expected `class NAME`"),
            ("KERNEL(1) f(float *x", "not closed"),
        ] {
            let found = signatures(text).unwrap_err();
            assert!(found.contains(expected), "{found}");
        }
        let odd = signatures("KERNEL(1) f(double *x) {}").unwrap();
        assert!(odd[0].launcher(0).unwrap_err().contains("no Rust type for `double`"));
    }
}
