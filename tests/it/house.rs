//! Rules of the source tree: imports between the files of a crate have no circles, the layers of
//! cpift-core use no higher layer, doc comments name their subject, and comments fit 100 columns.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Attribute, ItemMod, ItemUse, Macro, UseTree};

/// Module path of a file within its crate; empty for lib.rs and main.rs.
type Module = Vec<String>;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// All Rust files below `folder`, without build outputs.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let (mut files, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(next) = folders.pop() {
        for path in fs::read_dir(&next).unwrap().map(|entry| entry.unwrap().path()) {
            match path.is_dir() {
                true if path.ends_with("target") => {}
                true => folders.push(path),
                false if path.extension().is_some_and(|end| end == "rs") => files.push(path),
                false => {}
            }
        }
    }
    files.sort();
    files
}

/// Source folders of all crates.
fn crates() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> =
        fs::read_dir(root().join("crates")).unwrap().map(|entry| entry.unwrap().path().join("src")).collect();
    folders.sort();
    assert!(folders.len() > 8, "{folders:?}");
    folders
}

fn module_of(file: &Path) -> Module {
    let mut parts: Vec<String> =
        file.with_extension("").components().map(|part| part.as_os_str().to_str().unwrap().to_owned()).collect();
    if parts.last().is_some_and(|last| last == "mod") || parts == ["lib"] || parts == ["main"] {
        parts.pop();
    }
    parts
}

/// Returns the modules that each file of a crate names outside its tests.
fn imports(files: &[(Module, String)]) -> BTreeMap<Module, BTreeSet<Module>> {
    let known: BTreeSet<Module> = files.iter().map(|(module, _)| module.clone()).collect();
    let named = |(module, text): &(Module, String)| {
        let file = syn::parse_file(text).unwrap_or_else(|e| panic!("{module:?}: {e}"));
        let mut reader = Reader { known: &known, inline: module.clone(), named: BTreeSet::new() };
        reader.visit_file(&file);
        reader.named.remove(module);
        (module.clone(), reader.named)
    };
    files.iter().map(named).collect()
}

/// Collects the modules of a crate that a file names.
struct Reader<'a> {
    known: &'a BTreeSet<Module>,
    /// Current module: that of the file, plus inline modules.
    inline: Module,
    named: BTreeSet<Module>,
}

impl Reader<'_> {
    fn name(&mut self, path: &[String]) {
        let mut segments = path;
        let mut target = match path.first().map(String::as_str) {
            Some("crate") => Vec::new(),
            Some("self" | "super") => self.inline.clone(),
            // A child module, by its bare name.
            Some(first) if self.known.contains(&[self.inline.as_slice(), &[first.to_owned()]].concat()) => {
                self.inline.clone()
            }
            _ => return,
        };
        while let Some(first) = segments.first().filter(|s| ["crate", "self", "super"].contains(&s.as_str())) {
            if first == "super" {
                target.pop();
            }
            segments = &segments[1..];
        }
        target.extend_from_slice(segments);
        while !self.known.contains(&target) && target.pop().is_some() {}
        self.named.insert(target);
    }

    fn use_tree(&mut self, before: &[String], tree: &UseTree) {
        let with = |name: String| [before, &[name]].concat();
        match tree {
            UseTree::Path(path) => self.use_tree(&with(path.ident.to_string()), &path.tree),
            UseTree::Name(name) => self.name(&with(name.ident.to_string())),
            UseTree::Rename(name) => self.name(&with(name.ident.to_string())),
            UseTree::Glob(_) => self.name(before),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.use_tree(before, tree)),
        }
    }

    /// Finds paths in the arguments of a macro, which syn does not parse.
    fn tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let mut colons = 0;
        for token in tokens
            .into_iter()
            .chain(std::iter::once(TokenTree::Punct(proc_macro2::Punct::new(';', proc_macro2::Spacing::Alone))))
        {
            match &token {
                TokenTree::Ident(ident) if path.is_empty() || colons == 2 => {
                    path.push(ident.to_string());
                    colons = 0;
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' && !path.is_empty() => colons += 1,
                _ => {
                    // Not `pub(crate)`.
                    if path.len() > 1 {
                        self.name(&path);
                    }
                    path.clear();
                    colons = 0;
                    match token {
                        TokenTree::Ident(ident) => path.push(ident.to_string()),
                        TokenTree::Group(group) => self.tokens(group.stream()),
                        _ => {}
                    }
                }
            }
        }
    }
}

fn is_test(attributes: &[Attribute]) -> bool {
    attributes
        .iter()
        .any(|a| a.path().is_ident("cfg") && matches!(a.parse_args::<syn::Path>(), Ok(path) if path.is_ident("test")))
}

impl<'a> Visit<'a> for Reader<'_> {
    fn visit_item_mod(&mut self, item: &'a ItemMod) {
        if !is_test(&item.attrs) && item.content.is_some() {
            self.inline.push(item.ident.to_string());
            visit::visit_item_mod(self, item);
            self.inline.pop();
        }
    }

    fn visit_item_use(&mut self, item: &'a ItemUse) {
        if !is_test(&item.attrs) {
            self.use_tree(&[], &item.tree);
        }
    }

    fn visit_path(&mut self, path: &'a syn::Path) {
        self.name(&path.segments.iter().map(|segment| segment.ident.to_string()).collect::<Vec<_>>());
        visit::visit_path(self, path);
    }

    /// Does nothing, because `pub(super)` does not name an item.
    fn visit_visibility(&mut self, _: &'a syn::Visibility) {}

    fn visit_macro(&mut self, item: &'a Macro) {
        self.tokens(item.tokens.clone());
        visit::visit_macro(self, item);
    }
}

/// Finds a circle of imports, if there is one: each module names the next, and the last names the
/// first.
fn circle(imports: &BTreeMap<Module, BTreeSet<Module>>) -> Option<Vec<Module>> {
    fn walk(
        at: &Module,
        imports: &BTreeMap<Module, BTreeSet<Module>>,
        way: &mut Vec<Module>,
        done: &mut BTreeSet<Module>,
    ) -> Option<Vec<Module>> {
        if let Some(start) = way.iter().position(|module| module == at) {
            return Some(way[start..].to_vec());
        }
        if done.contains(at) {
            return None;
        }
        way.push(at.clone());
        let found = imports.get(at).into_iter().flatten().find_map(|next| walk(next, imports, way, done));
        way.pop();
        done.insert(at.clone());
        found
    }
    let mut done = BTreeSet::new();
    imports.keys().find_map(|module| walk(module, imports, &mut Vec::new(), &mut done))
}

fn read_crate(src: &Path) -> Vec<(Module, String)> {
    let files = sources(src).into_iter().filter(|file| !file.ends_with("main.rs") && !file.ends_with("tests.rs"));
    files.map(|file| (module_of(file.strip_prefix(src).unwrap()), fs::read_to_string(&file).unwrap())).collect()
}

#[test]
fn no_crate_has_a_circle_of_imports() {
    let shown = |circle: Vec<Module>| {
        circle.iter().map(|module| format!("crate::{}", module.join("::"))).collect::<Vec<_>>().join(" -> ")
    };
    let circles: Vec<String> = crates()
        .iter()
        .filter_map(|src| Some(format!("{}: {}", src.display(), shown(circle(&imports(&read_crate(src)))?))))
        .collect();
    assert!(circles.is_empty(), "{}", circles.join("\n"));
}

#[test]
fn a_circle_is_found() {
    let files = |c: &str| {
        [
            ("a", "use crate::b::B;\nfn f() { println!(\"{}\", crate::d::VALUE) }"),
            ("b", "pub use crate::c::C as B;"),
            ("c", c),
            ("d", ""),
            ("", "mod a; mod b; mod c; mod d;"),
        ]
        .map(|(name, text)| (name.split_terminator("::").map(str::to_owned).collect::<Module>(), text.to_owned()))
    };
    assert_eq!(circle(&imports(&files("pub struct C;"))), None);
    let tests_only = "pub struct C;\n#[cfg(test)]\nmod tests { use crate::a; }";
    assert_eq!(circle(&imports(&files(tests_only))), None);
    for back in [
        "use super::a;",
        "fn g() { crate::a::f() }",
        "fn g() { assert!(1 == { super::a::f(); 1 }) }",
        "mod inner { use super::super::a::f; }",
    ] {
        let found = circle(&imports(&files(&format!("pub struct C;\n{back}"))));
        assert_eq!(found, Some(vec![vec!["a".to_owned()], vec!["b".to_owned()], vec!["c".to_owned()]]), "{back}");
    }
}

#[test]
fn layers_of_the_core_name_no_higher_layer() {
    // Lowest first; cpift-core's lib.rs says what each holds.
    const LAYERS: [&[&str]; 7] = [
        &["error", "log_once", "closest", "progress"],
        &["files"],
        &["hub"],
        &["format"],
        &["stream"],
        &["record"],
        &["run"],
    ];
    let layer = |module: &Module| {
        LAYERS.iter().position(|layer| module.first().is_some_and(|first| layer.contains(&first.as_str())))
    };
    let src = root().join("crates/cpift-core/src");
    for (module, named) in imports(&read_crate(&src)).into_iter().filter(|(module, _)| !module.is_empty()) {
        let own = layer(&module).unwrap_or_else(|| panic!("{module:?} is in no layer"));
        for other in &named {
            assert!(layer(other).is_some_and(|other| other <= own), "{module:?} names {other:?}");
        }
    }
}

#[test]
fn doc_comments_name_their_subject() {
    const VAGUE: [&str; 7] = ["What", "Whether", "Where", "Which", "How", "That", "Why"];
    let mut found = Vec::new();
    for src in crates().into_iter().chain([root().join("tests")]) {
        for file in sources(&src) {
            let text = fs::read_to_string(&file).unwrap();
            let mut before = "";
            for (number, line) in text.lines().enumerate().map(|(i, line)| (i + 1, line.trim_start())) {
                let opens = !before.starts_with("///") && !before.starts_with("//!");
                let words = line.strip_prefix("///").or_else(|| line.strip_prefix("//!")).map(str::trim_start);
                let first = words.and_then(|words| words.split(|c: char| !c.is_alphabetic()).next());
                if opens && first.is_some_and(|first| VAGUE.contains(&first)) {
                    found.push(format!("{}:{number}: {line}", file.display()));
                }
                before = line;
            }
        }
    }
    assert!(found.is_empty(), "{} doc comments:\n{}", found.len(), found.join("\n"));
}

#[test]
fn comments_fit_100_columns() {
    let mut found = Vec::new();
    for file in sources(&root().join("crates")).into_iter().chain(sources(&root().join("tests"))) {
        let text = fs::read_to_string(&file).unwrap();
        for (number, line) in text.lines().enumerate() {
            let comment = line.trim_start();
            // Rows of tables cannot be wrapped.
            let table = comment.trim_start_matches(['/', '!']).trim_start().starts_with('|');
            if comment.starts_with("//") && !table && line.chars().count() > 100 {
                found.push(format!("{}:{}: {line}", file.display(), number + 1));
            }
        }
    }
    assert!(found.is_empty(), "{} comment lines:\n{}", found.len(), found.join("\n"));
}
