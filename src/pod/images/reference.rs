//! Names of images, and patterns for them.
//!
//! Source: distribution/reference (`normalize.go`, `regexp.go`), which a kubelet uses.

/// Where images without a registry come from.
const DOMAIN: &str = "docker.io";

/// A name of an image, complete: registry, repository, tag or digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// Registry and repository: `docker.io/library/busybox`.
    name: String,
    tag: Option<String>,
    digest: Option<String>,
}

/// The parts of a name or a pattern, registry and repository made complete.
struct Parts<'a> {
    name: String,
    tag: Option<&'a str>,
    digest: Option<&'a str>,
}

/// `name[:tag][@digest]`, where a port's colon is none of a tag's.
fn split(text: &str) -> Parts<'_> {
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (text, None),
    };
    let last = rest.rfind('/').map_or(0, |slash| slash + 1);
    let (name, tag) = match rest[last..].find(':') {
        Some(colon) => (&rest[..last + colon], Some(&rest[last + colon + 1..])),
        None => (rest, None),
    };
    Parts { name: complete(name), tag, digest }
}

/// Registry and repository (normalize.go, splitDockerDomain).
fn complete(name: &str) -> String {
    let (domain, rest) = match name.split_once('/') {
        Some((first, rest))
            if first == "localhost" || first.contains(['.', ':']) || first.to_lowercase() != first =>
        {
            (if first == "index.docker.io" { DOMAIN } else { first }, rest)
        }
        _ => (DOMAIN, name),
    };
    let library = if domain == DOMAIN && !rest.contains('/') { "library/" } else { "" };
    format!("{domain}/{library}{rest}")
}

impl Reference {
    /// Reads a pod's `image`.
    ///
    /// # Errors
    /// What is wrong with it. Nothing in it can then be taken for an option or leave a directory.
    pub fn parse(image: &str) -> Result<Self, &'static str> {
        let Parts { name, tag, digest } = split(image);
        let (domain, path) = name.split_once('/').unwrap_or_default();
        let (host, port) = domain.split_once(':').map_or((domain, None), |(host, port)| (host, Some(port)));
        let is_label = |label: &str| {
            label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        let is_port = |port: &str| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
        if !host.split('.').all(is_label) || !port.is_none_or(is_port) {
            return Err("its registry is no host's name");
        }
        if !path.split('/').all(is_component) {
            return Err("its repository is of lower-case letters, digits, and `.`, `_`, `-` between them");
        }
        let in_tag = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
        if !tag.is_none_or(|tag| {
            (1..=128).contains(&tag.len()) && tag.bytes().all(in_tag) && !tag.starts_with(['.', '-'])
        }) {
            return Err("its tag is of up to 128 letters, digits, `_`, `.` and `-`");
        }
        let is_digest = |digest: &str| {
            digest.split_once(':').is_some_and(|(algorithm, hex)| {
                algorithm.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_+.".contains(&b))
                    && algorithm.starts_with(|c: char| c.is_ascii_alphabetic())
                    && hex.len() >= 32
                    && hex.bytes().all(|b| b.is_ascii_hexdigit())
            })
        };
        if !digest.is_none_or(is_digest) {
            return Err("its digest is of the form sha256:<hexadecimal digits>");
        }
        let tag = tag.or(digest.is_none().then_some("latest")).map(str::to_owned);
        Ok(Self { tag, digest: digest.map(str::to_owned), name })
    }

    /// Registry, repository, and the digest or else the tag: what is pulled.
    #[must_use]
    pub fn full(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => format!("{}@{digest}", self.name),
            (None, Some(tag)) => format!("{}:{tag}", self.name),
            (None, None) => self.name.clone(),
        }
    }

    /// The repository's last part: `busybox`.
    #[must_use]
    pub fn short(&self) -> &str {
        self.name.rsplit('/').next().unwrap_or_default()
    }

    /// The tag; `latest` where there is none.
    #[must_use]
    pub fn tag(&self) -> &str {
        self.tag.as_deref().unwrap_or("latest")
    }

    /// The name as people write it, without what is understood, a tag and a digest.
    #[must_use]
    pub fn familiar(&self) -> &str {
        let name = self.name.strip_prefix("docker.io/").unwrap_or(&self.name);
        name.strip_prefix("library/").filter(|_| name.len() < self.name.len()).unwrap_or(name)
    }
}

/// Letters and digits with `.`, `_`, `__` or hyphens between them (regexp.go, pathComponent).
fn is_component(component: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    let ends = bytes.first().is_some_and(|b| is_word(*b)) && bytes.last().is_some_and(|b| is_word(*b));
    let between = bytes.split(|b| is_word(*b)).all(|separator| {
        matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|b| *b == b'-')
    });
    ends && between
}

/// A pattern for names of images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pattern {
    name: Glob,
    /// None: any tag, and none.
    tag: Option<Glob>,
    /// None: any digest, and none.
    digest: Option<Glob>,
}

impl Pattern {
    /// Reads a pattern. What it leaves out is made complete as an image's name is, so `busybox` is Docker's, of any tag.
    /// `**` at its beginning stands for the registry too.
    pub(super) fn parse(text: &str) -> Result<Self, &'static str> {
        if text.is_empty() || text.contains(char::is_whitespace) {
            return Err("an image's name is wanted, without blanks");
        }
        let parts = split(text);
        let name = if text.starts_with("**") {
            parts.name.strip_prefix("docker.io/library/").or(parts.name.strip_prefix("docker.io/"))
        } else {
            None
        };
        Ok(Self {
            name: Glob::parse(name.unwrap_or(&parts.name))?,
            tag: parts.tag.map(Glob::parse).transpose()?,
            digest: parts.digest.map(Glob::parse).transpose()?,
        })
    }

    pub(super) fn matches(&self, image: &Reference) -> bool {
        let part = |glob: &Option<Glob>, part: &Option<String>| {
            glob.as_ref().is_none_or(|glob| part.as_deref().is_some_and(|part| glob.matches(part)))
        };
        self.name.matches(&image.name) && part(&self.tag, &image.tag) && part(&self.digest, &image.digest)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Glob(Vec<Piece>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Byte(u8),
    /// `?`: one, but no `/`.
    One,
    /// `*`: any, but no `/`.
    Some,
    /// `**`: any.
    All,
    /// `[a-z]`, `[!a]`.
    Of {
        not: bool,
        ranges: Vec<(u8, u8)>,
    },
}

impl Glob {
    fn parse(text: &str) -> Result<Self, &'static str> {
        if text.is_empty() {
            return Err("a part of it is empty");
        }
        let mut pieces = Vec::new();
        let mut rest = text.as_bytes();
        while let Some((first, after)) = rest.split_first() {
            rest = after;
            pieces.push(match first {
                b'*' if rest.first() == Some(&b'*') => {
                    rest = &rest[1..];
                    Piece::All
                }
                b'*' => Piece::Some,
                b'?' => Piece::One,
                b'[' => {
                    let end = rest.iter().position(|b| *b == b']').filter(|end| *end > 0);
                    let Some(end) = end else { return Err("`[` has no `]`, or nothing is between them") };
                    let piece = class(&rest[..end])?;
                    rest = &rest[end + 1..];
                    piece
                }
                b']' => return Err("`]` has no `[`"),
                byte => Piece::Byte(*byte),
            });
        }
        Ok(Self(pieces))
    }

    /// As long as both together, however many stars there are.
    fn matches(&self, text: &str) -> bool {
        let text = text.as_bytes();
        // Whether the pieces so far can be the first n bytes.
        let mut can: Vec<bool> = (0..=text.len()).map(|n| n == 0).collect();
        for piece in &self.0 {
            let mut next = vec![false; text.len() + 1];
            match piece {
                Piece::Some | Piece::All => {
                    next[0] = can[0];
                    for n in 1..=text.len() {
                        let goes_on = next[n - 1] && (*piece == Piece::All || text[n - 1] != b'/');
                        next[n] = can[n] || goes_on;
                    }
                }
                piece => {
                    for n in 1..=text.len() {
                        next[n] = can[n - 1] && piece.takes(text[n - 1]);
                    }
                }
            }
            can = next;
        }
        can[text.len()]
    }
}

impl Piece {
    fn takes(&self, byte: u8) -> bool {
        match self {
            Self::Byte(own) => *own == byte,
            Self::One => byte != b'/',
            Self::Of { not, ranges } => {
                byte != b'/' && ranges.iter().any(|(from, to)| (*from..=*to).contains(&byte)) != *not
            }
            Self::Some | Self::All => true,
        }
    }
}

fn class(text: &[u8]) -> Result<Piece, &'static str> {
    let (not, mut rest) = match text.strip_prefix(b"!") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    if rest.is_empty() || rest.iter().any(|b| b"[/:@".contains(b)) {
        return Err("between `[` and `]` are letters and ranges of them, as in [a-z]");
    }
    let mut ranges = Vec::new();
    while let Some((from, after)) = rest.split_first() {
        match after {
            [b'-', to, after @ ..] if from <= to => {
                ranges.push((*from, *to));
                rest = after;
            }
            [b'-', _, ..] => return Err("a range goes from the lower to the higher, as in [a-z]"),
            after => {
                ranges.push((*from, *from));
                rest = after;
            }
        }
    }
    Ok(Piece::Of { not, ranges })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:0123456789abcdef0123456789abcdef";

    #[test]
    fn names_are_made_complete_as_docker_does() {
        let digest = format!("a/b@{DIGEST}");
        let both = format!("a/b:1@{DIGEST}");
        let full = format!("docker.io/a/b@{DIGEST}");
        // Many of these are in normalize_test.go.
        let table = [
            ("busybox", "docker.io/library/busybox:latest", "busybox"),
            ("library/busybox", "docker.io/library/busybox:latest", "busybox"),
            ("docker.io/busybox:1.36", "docker.io/library/busybox:1.36", "busybox"),
            ("index.docker.io/library/busybox", "docker.io/library/busybox:latest", "busybox"),
            ("user/app", "docker.io/user/app:latest", "user/app"),
            ("localhost/app", "localhost/app:latest", "localhost/app"),
            ("localhost:5000/app:2", "localhost:5000/app:2", "localhost:5000/app"),
            ("ghcr.io/a/b-c/d__e:v1.0", "ghcr.io/a/b-c/d__e:v1.0", "ghcr.io/a/b-c/d__e"),
            ("Upper/app", "Upper/app:latest", "Upper/app"),
            (&digest, &full, "a/b"),
            (&both, &full, "a/b"),
        ];
        for (image, full, familiar) in table {
            let reference = Reference::parse(image).unwrap();
            assert_eq!((reference.full().as_str(), reference.familiar()), (full, familiar), "{image}");
        }
        let reference = Reference::parse("quay.io/a/app:v2").unwrap();
        assert_eq!((reference.short(), reference.tag()), ("app", "v2"));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for bad in [
            "",
            "a b",
            "-x",
            "../../etc/passwd",
            "a/../b",
            "app:",
            "app:.x",
            "app@sha256:xyz",
            "a//b",
            "/a",
            "UPPER",
            "a.b/",
            "x.io:p/a",
            "a___b",
            "a..b",
            "app:{tag}",
            "é",
        ] {
            assert!(Reference::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn patterns() {
        let digest = format!("busybox@{DIGEST}");
        let table = [
            ("busybox", "busybox:1.36", true),
            ("busybox", &digest, true),
            ("busybox", "quay.io/library/busybox", false),
            ("busybox:latest", "busybox", true),
            ("busybox:1.*", "busybox:1.36.1", true),
            ("busybox:1.*", "busybox:2", false),
            ("busybox:1", &digest, false),
            ("busybox@sha256:0123*", &digest, true),
            ("busybox@sha256:1123*", &digest, false),
            ("busybox@sha256:0123*", "busybox", false),
            ("quay.io/org/*", "quay.io/org/app:1", true),
            ("quay.io/org/*", "quay.io/org/team/app:1", false),
            ("quay.io/org/**", "quay.io/org/team/app:1", true),
            ("*", "anything:1", true),
            ("*", "user/app", false),
            ("**", "user/app", true),
            ("**", "ghcr.io/a/b/c:v", true),
            ("**/app:v[0-9]", "ghcr.io/a/app:v7", true),
            ("**/app:v[!0-9]", "ghcr.io/a/app:v7", false),
            ("localhost:5000/a??", "localhost:5000/abc", true),
            ("localhost:5000/a??", "localhost:5000/ab", false),
            ("*.example.org/a*b*c", "r.example.org/aXXbXXc", false),
            ("*.example.org/a*b*c", "r.example.org/axxbxxc", true),
        ];
        for (pattern, image, wanted) in table {
            let Ok(image) = Reference::parse(image) else {
                assert!(!wanted, "{image}");
                continue;
            };
            assert_eq!(Pattern::parse(pattern).unwrap().matches(&image), wanted, "{pattern} {image:?}");
        }
        for bad in ["", "a b", "a[", "a[]", "a]", "a[z-a]", "a:", "a[b:c]", "a@"] {
            assert!(Pattern::parse(bad).is_err(), "{bad}");
        }
    }
}
