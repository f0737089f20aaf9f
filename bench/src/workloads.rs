//! Workloads: ordinary programs whose memory the page sets are made of.
//!
//! Each is a program at work on data of the kind that it is used for. Scripts say `ready` on their
//! standard output when their data stands and then wait for their input to close; a compiler is
//! taken in the middle of its work, when it has grown to a given size. What is not installed is
//! left out, and the page set's description says what it was made of.

/// When a program is stopped to copy its memory.
pub enum Moment {
    /// It has said that it is ready.
    Ready,
    /// It holds that many bytes of anonymous memory, or has stopped growing for a while.
    Grown(u64),
}

/// A program and what it works on.
pub struct Workload {
    pub name: &'static str,
    pub program: &'static str,
    pub arguments: &'static [&'static str],
    /// A file made in the working folder before the program starts.
    pub file: (&'static str, fn() -> String),
    pub moment: Moment,
}

/// Every workload, in the order in which their pages come in the set.
pub const ALL: [Workload; 7] = [
    Workload {
        name: "python objects",
        program: "python3",
        arguments: &["objects.py"],
        file: ("objects.py", || PYTHON_OBJECTS.to_owned() + READY),
        moment: Moment::Ready,
    },
    Workload {
        name: "python text and json",
        program: "python3",
        arguments: &["text.py"],
        file: ("text.py", || PYTHON_TEXT.to_owned() + READY),
        moment: Moment::Ready,
    },
    Workload {
        name: "python sqlite",
        program: "python3",
        arguments: &["sqlite.py"],
        file: ("sqlite.py", || PYTHON_SQLITE.to_owned() + READY),
        moment: Moment::Ready,
    },
    Workload {
        name: "python numbers and blobs",
        program: "python3",
        arguments: &["numbers.py"],
        file: ("numbers.py", || PYTHON_NUMBERS.to_owned() + READY),
        moment: Moment::Ready,
    },
    Workload {
        name: "perl hashes",
        program: "perl",
        arguments: &["hashes.pl"],
        file: ("hashes.pl", || PERL_HASHES.to_owned()),
        moment: Moment::Ready,
    },
    Workload {
        name: "g++",
        program: "g++",
        arguments: &["-O2", "-std=c++17", "-S", "-o", "/dev/null", "compiled.cc"],
        file: ("compiled.cc", cpp_source),
        moment: Moment::Grown(120 << 20),
    },
    Workload {
        name: "rustc",
        program: "rustc",
        arguments: &["-O", "--edition=2024", "--crate-type=lib", "--emit=obj", "compiled.rs"],
        file: ("compiled.rs", rust_source),
        moment: Moment::Grown(140 << 20),
    },
];

const READY: &str = "
import sys
print('ready', flush=True)
sys.stdin.read()
";

const PYTHON_OBJECTS: &str = r#"
import random, datetime, collections
random.seed(1)
words = ['alpha', 'bravo', 'charlie', 'delta', 'echo', 'foxtrot', 'golf', 'hotel', 'india']
class Order:
    def __init__(self, number):
        self.number = number
        self.customer = random.choice(words) + str(random.randrange(5000))
        self.lines = [(random.choice(words), random.randrange(1, 20), random.random() * 100)
                      for _ in range(random.randrange(1, 6))]
        self.when = datetime.datetime(2024, 1, 1) + datetime.timedelta(seconds=number * 37)
orders = [Order(number) for number in range(45000)]
by_customer = collections.defaultdict(list)
for order in orders:
    by_customer[order.customer].append(order)
totals = {name: sum(c * p for o in found for _, c, p in o.lines)
          for name, found in by_customer.items()}
orders = [order for order in orders if random.random() < 0.8]
index = {(order.customer, order.number): order for order in orders}
"#;

const PYTHON_TEXT: &str = r#"
import ast, collections, json, os, random, sysconfig
random.seed(2)
folder = sysconfig.get_paths()['stdlib']
names = sorted(name for name in os.listdir(folder) if name.endswith('.py'))[:70]
texts = {name: open(os.path.join(folder, name), encoding='utf8').read() for name in names}
trees = [ast.parse(texts[name]) for name in names[:25]]
count = collections.Counter(word for text in texts.values() for word in text.split())
lines = [line for text in texts.values() for line in text.splitlines() if line.strip()]
people = [{'id': n, 'name': 'user%06d' % n, 'mail': 'user%06d@example.org' % n,
           'tags': random.sample(['a', 'bb', 'ccc', 'dddd', 'eeeee'], 2),
           'score': round(random.random() * 1000, 3), 'active': n % 3 == 0}
          for n in range(20000)]
document = json.dumps(people)
again = json.loads(document)
"#;

const PYTHON_SQLITE: &str = r#"
import random, sqlite3
random.seed(3)
db = sqlite3.connect(':memory:')
db.execute('create table item (id integer primary key, name text, kind text, price real, n int)')
db.execute('create table sale (item int, day text, amount int, note text)')
db.executemany('insert into item values (?, ?, ?, ?, ?)', (
    (n, 'item number %d' % n, random.choice(['tool', 'part', 'book']), random.random() * 500,
     random.randrange(1000)) for n in range(120000)))
db.executemany('insert into sale values (?, ?, ?, ?)', (
    (random.randrange(120000), '2024-%02d-%02d' % (n % 12 + 1, n % 28 + 1), random.randrange(9),
     'x' * random.randrange(20)) for n in range(250000)))
db.execute('create index sale_item on sale (item)')
db.execute('create index item_name on item (name)')
db.execute('delete from sale where amount = 0')
rows = db.execute('select kind, sum(amount * price) from item join sale on item = id '
                  'group by kind').fetchall()
top = db.execute('select name, price from item order by price desc limit 20000').fetchall()
"#;

const PYTHON_NUMBERS: &str = r#"
import array, hashlib, math, random, zlib
random.seed(4)
wave = array.array('d', (math.sin(n / 50) * 100 for n in range(500000)))
noise = array.array('d', (random.gauss(0, 1) for n in range(300000)))
counts = array.array('i', (random.randrange(100) for n in range(700000)))
sieve = bytearray([1]) * 2000000
for n in range(2, 1415):
    if sieve[n]:
        sieve[n * n::n] = bytes(len(range(n * n, 2000000, n)))
floats = [value * 2 for value in noise[:100000]]
matrix = [[row * column % 97 for column in range(400)] for row in range(400)]
text = ' '.join(str(n * n) for n in range(60000)).encode()
blobs = {n: zlib.compress(text[n * 500:n * 500 + 9000]) for n in range(700)}
digests = {hashlib.sha256(b'%d' % n).digest(): n for n in range(20000)}
image = bytes((x * y >> 6) & 255 for y in range(1000) for x in range(1500))
"#;

const PERL_HASHES: &str = r#"
srand(5);
my (%count, %record, @list);
for my $n (0 .. 60000) {
    my $key = sprintf("host%d.example.net", int(rand(30000)));
    $count{$key}++;
    push @list, "GET /path/$n/index.html?user=" . int(rand(9999)) . " 200 " . int(rand(50000));
}
for my $n (0 .. 25000) {
    $record{$n} = { name => "name$n", size => $n * 3, parts => [1 .. $n % 8], ratio => $n / 7 };
}
my @sorted = sort { $a cmp $b } @list;
my $joined = join("\n", @sorted);
$| = 1;
print "ready\n";
my $wait = <STDIN>;
"#;

/// Templates enough to keep a C++ compiler busy for seconds.
fn cpp_source() -> String {
    let mut source = String::from(
        "#include <algorithm>\n#include <map>\n#include <regex>\n#include <sstream>\n\
         #include <string>\n#include <unordered_map>\n#include <vector>\n",
    );
    for n in 0..60 {
        source += &format!(
            "struct key{n} {{ int a; std::string b; bool operator<(const key{n}& o) const \
             {{ return a < o.a || (a == o.a && b < o.b); }} }};\n\
             std::string work{n}(const std::string& text) {{\n\
             std::map<key{n}, std::vector<std::string>> map; std::smatch found;\n\
             std::unordered_map<std::string, key{n}> index; std::ostringstream out;\n\
             std::regex pattern(\"([a-z]+{n})=([0-9]*)\"); std::string rest = text;\n\
             while (std::regex_search(rest, found, pattern)) {{\n\
             map[key{n}{{int(found.length()), found[1]}}].push_back(found[2]);\n\
             index.emplace(found[1], key{n}{{{n}, found[2]}}); rest = found.suffix(); }}\n\
             for (auto& each : map) {{ std::sort(each.second.begin(), each.second.end());\n\
             for (auto& part : each.second) out << each.first.b << part << index.size(); }}\n\
             return out.str(); }}\n"
        );
    }
    source
}

/// Generic code enough to keep a Rust compiler busy for seconds.
fn rust_source() -> String {
    let mut source = String::from("use std::collections::{BTreeMap, HashMap, VecDeque};\n");
    for n in 0..250 {
        source += &format!(
            "#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]\n\
             pub enum Node{n} {{ Leaf(u64, String), Pair(Box<Node{n}>, Box<Node{n}>), \
             Many(Vec<Node{n}>), Named {{ name: String, value: Option<i32> }} }}\n\
             pub fn work{n}(input: &[Node{n}]) -> Result<BTreeMap<String, Node{n}>, String> {{\n\
             let mut map = BTreeMap::new(); let mut seen = HashMap::new();\n\
             let mut queue: VecDeque<_> = input.iter().cloned().collect();\n\
             while let Some(node) = queue.pop_front() {{\n\
             *seen.entry(node.clone()).or_insert(0usize) += {n};\n\
             match node {{ Node{n}::Leaf(at, name) if at > {n} => {{ map.insert(name.clone(), \
             Node{n}::Leaf(at - 1, name)); }}\n\
             Node{n}::Pair(a, b) => {{ queue.push_back(*a); queue.push_front(*b); }}\n\
             Node{n}::Many(nodes) => queue.extend(nodes.into_iter().filter(|n| !seen.contains_key(n))),\n\
             other => return Err(format!(\"{{other:?}} of {{}}\", seen.len())) }} }}\n\
             Ok(map) }}\n"
        );
    }
    source
}
