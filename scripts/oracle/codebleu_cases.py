"""Pairs of code, written for this project, that the CodeBLEU oracles compare: (name, reference,
candidate) by language."""

PYTHON = {
    "sum": '''def total(values):
    """Adds them up."""
    result = 0
    for value in values:
        result += value  # one by one
    return result
''',
    "sum_renamed": '''def add(xs):
    acc = 0
    for x in xs:
        acc += x
    return acc
''',
    "sum_builtin": "def total(values):\n    return sum(values)\n",
    "branches": '''def sign(n):
    if n > 0:
        s = 1
    elif n < 0:
        s = -1
    else:
        s = 0
    return s
''',
    "branches_no_else": '''def sign(n):
    s = 0
    if n > 0:
        s = 1
    if n < 0:
        s = -1
    return s
''',
    "while": '''def gcd(a, b):
    while b:
        a, b = b, a % b
    return a
''',
    "while_renamed": '''def gcd(m, n):
    while n != 0:
        t = n
        n = m % n
        m = t
    return m
''',
    "nested": '''def outer(x):
    def inner(y, z=2):
        nonlocal x
        x = y * z
        return lambda w: w + x
    return inner(x)(3)
''',
    "class": '''class Stack:
    """A stack."""

    size: int = 0

    def __init__(self, items=None):
        self.items = list(items or [])

    @property
    def top(self):
        return self.items[-1]

    def push(self, item):
        self.items.append(item)
        self.size += 1
''',
    "comprehension": "pairs = {k: [w for w in v if w and w not in k] for k, v in table.items()}\nprint(pairs)\n",
    "comprehension_loop": '''pairs = {}
for k, v in table.items():
    pairs[k] = []
    for w in v:
        if w and w not in k:
            pairs[k].append(w)
print(pairs)
''',
    "strings": '''x = "# not a comment"  # a comment
y = r'it\\'s' + f"{x!r:>10}" + b"\\x00".decode()
z = \'\'\'a
  # still text
\'\'\'
w = 'joined \\
line'
print(x, y, z, w)
''',
    "unicode": 'größe = 3\nfür = größe * 2; name = "naïve 漢字 🎉"; print(name, für)\n',
    "no_flow": "pass\n",
    "tabs": "if a:\n\tb = a\n\tif b:\n\t\tc =\tb\nelse:\n\tb = 1\n",
    "for_else": "for i, (a, b) in enumerate(rows):\n    if a == b:\n        break\nelse:\n    i = -1\nprint(i)\n",
    "async": "async def get(s, *urls, **kw):\n    async with s as t:\n        r = [await t.get(u) async for u in urls]\n    return r, kw\n",
    "match": "match p:\n    case {'x': x, 'y': [y, *_]} if x:\n        q = x + y\n    case _:\n        q = None\nprint(q := q)\n",
    "continued": "total = first + \\\n    second  # end\nif (a and\n    # in between\n    b): total -= a\n",
    "try": "try:\n    f = open(p)\nexcept (OSError, ValueError) as e:\n    raise RuntimeError(p) from e\nfinally:\n    f = None\n",
    "error": "def total(values:\n    result = 0\n    for value in values\n        result += value\n    return result)\n",
    "dedent": "def f(a):\n        b = a  # gone?\n    return b\n",
    "unclosed": 'def f(a):\n    """Never closed\n    return a  # kept\n',
    "prose": "Sure! Here's the function you asked for: it's simple.",
    "one": "x",
}

JAVA = {
    "sum": '''public class Sum {
    /** Adds them up. */
    static int sum(int[] values) {
        int result = 0; // so far
        for (int value : values) {
            result += value;
        }
        return result;
    }
}
''',
    "sum_renamed": '''public class Adder {
    static int add(int[] xs) {
        int acc = 0;
        for (int x : xs) { acc += x; }
        return acc;
    }
}
''',
    "sum_for": '''class Sum {
    static int sum(int[] values) {
        int result = 0;
        for (int i = 0; i < values.length; i++) {
            int next = values[i];
            result = result + next;
        }
        return result;
    }
}
''',
    "branches": '''int sign(int n) {
    int s;
    if (n > 0) { s = 1; } else if (n < 0) { s = -1; } else { s = 0; }
    return s;
}
''',
    "branches_no_else": "int sign(int n) { int s = 0; if (n > 0) s = 1; if (n < 0) s = -n / n; return s; }\n",
    "while": "int gcd(int a, int b) { while (b != 0) { int t = b; b = a % b; a = t; } return a; }\n",
    "do_while": "int count(int n) { int c = 0; do { n /= 10; ++c; } while (n > 0); return c; }\n",
    "nested": '''class Outer<T extends Comparable<T>> {
    private final List<T> items = new ArrayList<>();
    class Inner { T first() { return items.get(0); } }
    Function<T, T> twice(Function<T, T> f) { return x -> { T y = f.apply(x); return f.apply(y); }; }
}
''',
    "streams": 'List<String> out = in.stream().filter(s -> !s.isEmpty()).map(String::trim).collect(Collectors.toList());\n',
    "switch": '''String day(int d) {
    String s = switch (d) { case 1, 7 -> "weekend"; default -> { String t = "day" + d; yield t; } };
    return s;
}
''',
    "strings": 'class S { String a = "// no \\"comment\\" /* */"; char c = \'"\'; /* gone */ String b = a + c; }\n',
    "unicode": 'class Größe { int größe = 3; String s = "漢字 🎉"; int doppelt() { int d = größe * 2; return d; } }\n',
    "no_flow": ";\n",
    "try": "void f() throws E { try (var in = open(p)) { int b = in.read(); use(b); } catch (E | F e) { throw e; } finally { n--; } }\n",
    "assign_chain": "void f() { int a, b, c; a = b = c = g(1); a += b; int[] d = {a, b}; d[a] = d[b] + c; }\n",
    "error": "public class Sum { static int sum(int[] values { int result = 0 for (int value : values) result += value; return }\n",
    "unclosed": 'class A { /* never closed\n int a = 1; // kept\n String s = "open;\n }\n',
    "prose": "Sure! Here's the class you asked for: it's simple.",
    "one": "x",
}

JAVASCRIPT = {
    "sum": '''// Adds them up.
function sum(values) {
  let result = 0;
  for (const value of values) {
    result += value;
  }
  return result;
}
''',
    "sum_renamed": "function add(xs) {\n  let acc = 0;\n  for (const x of xs) {\n    acc += x;\n  }\n  return acc;\n}\n",
    "sum_for": '''function sum(values) {
  var result = 0;
  for (var i = 0, n = values.length; i < n; i++) {
    var next = values[i];
    result = result + next;
  }
  return result;
}
''',
    "sum_reduce": "const sum = (values) => values.reduce((a, b) => a + b, 0);\n",
    "branches": "function sign(n) {\n  let s = 0;\n  if (n > 0) { s += 1; } else if (n < 0) { s -= 1; } else { s = n; }\n  return s;\n}\n",
    "branches_no_else": "function sign(n) { let s = 0; if (n > 0) s += n; if (n < 0) { let t = n; s -= t; } return s; }\n",
    "while": "function gcd(a, b) { while (b) { let t = b; b = a % b; a = t; } return a; }\n",
    "nested": "function outer(x) {\n  function inner(y = x, {z, ...rest} = {}) { return () => { x += y; return [x, z, ...rest]; }; }\n  return inner(x)();\n}\n",
    "class": '''class Stack extends Base {
  #items = [];
  static made = 0;
  constructor(items = []) { super(); this.#items = items; Stack.made++; }
  get top() { return this.#items[this.#items.length - 1]; }
  async *[Symbol.asyncIterator]() { for await (const i of this.#items) yield i; }
}
''',
    "jsx": "const App = ({name}) => <div className=\"app\" {...name}>{name ? <b>Hi {name}</b> : null}</div>;\n",
    "strings": "const a = \"// no\" + '/* no */' + `t ${b /* gone */} // gone too`; const r = /\\/\\*/g; // end\nuse(a, r);\n",
    "unicode": 'const größe = 3; let s = "漢字 🎉"; let doppelt = größe * 2; console.log(s, doppelt);\n',
    "no_flow": ";\n",
    "async": "export default async function get(u) { try { const r = await fetch(u); return await r.json(); } catch ({message: m}) { throw new Error(m); } }\n",
    "destructuring": "const {a: {b = 1}, ...c} = d, [e, , f = b] = c; switch (e) { case 1: f++; break; default: --f; }\n",
    "error": "function sum(values { let result = 0; for (const value of values) result += value; return result\n",
    "unclosed": "let a = 1; /* never closed\nlet b = a; // kept\nlet s = 'open;\n",
    "prose": "Sure! Here's the function you asked for: it's simple.",
    "one": "x",
}

C = {
    "sum": '''/* Adds them up. */
#include <stddef.h>
int sum(const int *values, size_t n) {
    int result = 0; // so far
    for (size_t i = 0; i < n; i++) {
        result += values[i];
    }
    return result;
}
''',
    "sum_renamed": "#include <stddef.h>\nint add(const int *xs, size_t m) {\n    int acc = 0;\n    for (size_t j = 0; j < m; j++) {\n        acc += xs[j];\n    }\n    return acc;\n}\n",
    "sum_while": "int sum(int *v, int n) { int r; r = 0; while (n > 0) { n = n - 1; r = r + v[n]; } return r; }\n",
    "branches": "int sign(int n) { int s; if (n > 0) { s = 1; } else if (n < 0) { s = -1; } else { s = 0; } return s; }\n",
    "branches_no_else": "int sign(int n) { int s = 0; if (n > 0) s = 1; if (n < 0) s = n / -n; return s; }\n",
    "struct": '''typedef struct node { int value; struct node *next; } node;
static node *push(node *head, int value) {
    node *n = malloc(sizeof *n);
    n->value = value;
    n->next = head;
    return n;
}
''',
    "pointers": "void swap(int *a, int *b) { int t = *a; *a = *b; *b = t; }\nvoid f(void) { int x = 1, y = 2; swap(&x, &y); }\n",
    "switch": "int f(int k) { int r; switch (k) { case 'a': case 2: r = k; break; default: goto end; } end: return r ? r : ~k; }\n",
    "macros": "#define MAX(a, b) ((a) > (b) ? (a) : (b))\n#ifdef DEBUG\nint d = 1;\n#else\nint d = MAX(2, 3);\n#endif\n",
    "matrix": "void mul(int n, double a[n][n], double b[n][n], double c[n][n]) {\n  for (int i = 0; i < n; i++)\n    for (int j = 0; j < n; j++) {\n      double s = 0;\n      for (int k = 0; k < n; k++) s = s + a[i][k] * b[k][j];\n      c[i][j] = s;\n    }\n}\n",
    "strings": 'const char *a = "// no /* no */ \\" // no"; char c = \'\\\'\'; /* gone */ int f(void) { return puts(a) + c; }\n',
    "unicode": 'int groesse = 3; const char *s = "漢字 🎉"; int doppelt(void) { int d; d = groesse * 2; /* ü */ return d; }\n',
    "no_flow": ";\n",
    "function_pointers": "int (*ops[])(int, int) = {add, sub}; int apply(int (*f)(int, int), int a) { int b; b = a; return f(a, b); }\n",
    "do_while": "int digits(unsigned n) { int c = 0; do { c = c + 1; n = n / 10; } while (n); return c; }\n",
    "error": "int sum(int *values, int n { int result = 0 for (int i = 0; i < n; i++) result += values[i]; return }\n",
    "unclosed": 'int a = 1; /* never closed\nint b; // kept\nchar *s = "open;\n',
    "prose": "Sure! Here's the function you asked for: it's simple.",
    "one": "x",
}

CPP = {
    "sum": '''// Adds them up.
#include <vector>
int sum(const std::vector<int>& values) {
    int result = 0;
    for (int value : values) {
        result += value;
    }
    return result;
}
''',
    "sum_renamed": "#include <vector>\nint add(const std::vector<int>& xs) {\n    int acc = 0;\n    for (int x : xs) {\n        acc += x;\n    }\n    return acc;\n}\n",
    "sum_accumulate": "int sum(const std::vector<int>& values) { return std::accumulate(values.begin(), values.end(), 0); }\n",
    "branches": "int sign(int n) { int s; if (n > 0) { s = 1; } else if (n < 0) { s = -1; } else { s = 0; } return s; }\n",
    "branches_no_else": "int sign(int n) { int s = 0; if (n > 0) s = 1; if (int m = -n; m > 0) s = m / n; return s; }\n",
    "while": "int gcd(int a, int b) { while (b) { auto t = b; b = a % b; a = t; } return a; }\n",
    "class": '''template <typename T>
class Stack : public Base<T> {
  public:
    explicit Stack(std::size_t n = 0) : items_(n), size_{n} {}
    virtual ~Stack() = default;
    void push(T&& item) override { items_.push_back(std::move(item)); size_ = size_ + 1; }
    T& operator[](int i) const noexcept { return items_[i]; }
  private:
    std::vector<T> items_;
    std::size_t size_;
};
''',
    "lambda": "auto f = [&x, y = 2](auto z) mutable -> int { x = y * z; return [=] { return x; }(); };\n",
    "ranges": "for (const auto& [key, value] : table) { if (auto it = seen.find(key); it != seen.end()) total = total + value; }\n",
    "namespaces": "namespace a::b { using namespace std; enum class E : int { X = 1, Y }; constexpr E e = E::X; }\n",
    "exceptions": 'try { auto p = std::make_unique<int>(3); *p = 4; } catch (const std::exception& e) { std::cout << e.what() << std::endl; throw; }\n',
    "concepts": "template <class T> concept Adds = requires(T a, T b) { { a + b } -> std::same_as<T>; };\nauto g(Adds auto a) { decltype(a) b; b = a; return b; }\n",
    "strings": 'auto a = "// no /* no */"; char c = \'"\'; /* gone */ auto r = R"(raw // text)"; int f() { return use(a, c, r); }\n',
    "unicode": 'int groesse = 3; auto s = u8"漢字 🎉"; int doppelt() { int d; d = groesse * 2; /* ü */ return d; }\n',
    "no_flow": ";\n",
    "nested_loops": "for (int i = 0; i < n; ++i) { int j; j = i; while (j > 0) { a[j] = a[j - 1]; j = j - 1; } a[j] = i; }\n",
    "error": "int sum(const std::vector<int& values) { int result = 0 for (int value : values) result += value; return }\n",
    "unclosed": 'int a = 1; /* never closed\nint b; // kept\nauto s = "open;\n',
    "prose": "Sure! Here's the function you asked for: it's simple.",
    "one": "x",
}

SNIPPETS = {"python": PYTHON, "java": JAVA, "javascript": JAVASCRIPT, "c": C, "cpp": CPP}

# What a snippet is also compared with: every one with itself, and these.
RELATED = [
    ("sum", "sum_renamed"), ("sum_renamed", "sum"), ("sum", "sum_for"), ("sum", "sum_while"), ("sum", "sum_builtin"), ("sum", "sum_reduce"),
    ("sum", "sum_accumulate"), ("branches", "branches_no_else"), ("branches_no_else", "branches"), ("while", "while_renamed"),
    ("comprehension", "comprehension_loop"), ("comprehension_loop", "comprehension"), ("sum", "error"), ("error", "sum"),
    ("sum", "unclosed"), ("unclosed", "sum"), ("sum", "prose"), ("prose", "sum"), ("sum", "one"), ("one", "sum"), ("no_flow", "sum"),
    ("sum", "no_flow"), ("unicode", "strings"), ("strings", "unicode"), ("class", "nested"), ("nested", "class"), ("while", "sum"),
]


def pairs():
    """Yields (language, name, reference, candidate)."""
    for language, snippets in SNIPPETS.items():
        for name, code in snippets.items():
            yield language, f"{name}, itself", code, code
        for reference, candidate in RELATED:
            if reference in snippets and candidate in snippets:
                yield language, f"{reference}, {candidate}", snippets[reference], snippets[candidate]
        code = snippets["sum"]
        yield language, "nothing for sum", code, ""
        yield language, "sum for nothing", " \n", code
        yield language, "cut short", code, code[: len(code) * 2 // 3]
        yield language, "said twice", code, code + code
