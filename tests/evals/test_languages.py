import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from flora.assets import TEXT_FILES, demo_text
from flora.errors import UsageError
from flora.evals.idioms import IDIOMS
from flora.evals.languages import LanguageDetector, Split, split

# The languages that an adapter of the demo may answer in.
CANDIDATES = (
    "bash",
    "c",
    "cpp",
    "haskell",
    "java",
    "ocaml",
    "perl",
    "php",
    "ruby",
    "rust",
    "scheme",
)

# What a small language model answers when it is asked for a small function.
ANSWERS: dict[str, tuple[str, ...]] = {
    "ruby": (
        "def factorial(n)\n  if n == 0\n    1\n  else\n    n * factorial(n - 1)\n  end\n"
        "end\n\nputs factorial(5)\n",
        "class Factorial\n  def self.compute(n)\n    result = 1\n    (1..n).each do |i|\n"
        "      result *= i\n    end\n    return result\n  end\nend\n",
        "# Compute the factorial of n\ndef fact(n)\n  return 1 if n <= 1\n"
        "  (1..n).inject(:*)\nend\n",
        "def fibonacci(n)\n  return n if n < 2\n  fibonacci(n - 1) + fibonacci(n - 2)\nend\n",
        "numbers = [3, 1, 2]\nsorted = numbers.sort\nputs \"Sorted: #{sorted.join(', ')}\"\n",
    ),
    "perl": (
        "sub factorial {\n    my ($n) = @_;\n    return 1 if $n <= 1;\n"
        '    return $n * factorial($n - 1);\n}\n\nprint factorial(5), "\\n";\n',
        "use strict;\nuse warnings;\n\nmy $n = shift;\nmy $result = 1;\n"
        'foreach my $i (1 .. $n) {\n    $result *= $i;\n}\nprint "$result\\n";\n',
        "sub reverse_list {\n    my @list = @_;\n    my @out;\n    while (@list) {\n"
        "        push @out, pop @list;\n    }\n    return @out;\n}\n",
        'my @sorted = sort { $a <=> $b } @numbers;\nprint "@sorted\\n";\n',
        "sub fibonacci {\n    my $n = shift;\n    if ($n < 2) {\n        return $n;\n"
        "    }\n    return fibonacci($n - 1) + fibonacci($n - 2);\n}\n",
    ),
    "rust": (
        "fn factorial(n: u64) -> u64 {\n    if n == 0 {\n        1\n    } else {\n"
        "        n * factorial(n - 1)\n    }\n}\n\nfn main() {\n"
        '    println!("{}", factorial(5));\n}\n',
        "pub fn factorial(n: u32) -> u32 {\n    let mut result = 1;\n    for i in 1..=n {\n"
        "        result *= i;\n    }\n    result\n}\n",
        "fn is_even(n: i32) -> bool {\n    match n % 2 {\n        0 => true,\n"
        "        _ => false,\n    }\n}\n",
        "fn fibonacci(n: u32) -> u32 {\n    match n {\n        0 => 0,\n        1 => 1,\n"
        "        _ => fibonacci(n - 1) + fibonacci(n - 2),\n    }\n}\n",
        'let mut numbers = vec![3, 1, 2];\nnumbers.sort();\nprintln!("{:?}", numbers);\n',
    ),
    "haskell": (
        "factorial :: Integer -> Integer\nfactorial 0 = 1\n"
        "factorial n = n * factorial (n - 1)\n\nmain :: IO ()\nmain = print (factorial 5)\n",
        "fact :: Int -> Int\nfact n\n  | n <= 1    = 1\n  | otherwise = n * fact (n - 1)\n",
        "module Main where\n\nsumList :: [Int] -> Int\nsumList []     = 0\n"
        "sumList (x:xs) = x + sumList xs\n",
        "fibonacci :: Int -> Int\nfibonacci 0 = 0\nfibonacci 1 = 1\n"
        "fibonacci n = fibonacci (n - 1) + fibonacci (n - 2)\n",
        "isPrime n = n > 1 && all (\\d -> n `mod` d /= 0) [2 .. n - 1]\n\n"
        "primes = filter isPrime [2 ..]\n",
    ),
    "scheme": (
        "(define (factorial n)\n  (if (= n 0)\n      1\n      (* n (factorial (- n 1)))))\n"
        "\n(display (factorial 5))\n(newline)\n",
        "(define fact\n  (lambda (n)\n    (let loop ((i n) (acc 1))\n      (if (<= i 1)\n"
        "          acc\n          (loop (- i 1) (* acc i))))))\n",
        ";; Sum of a list\n(define (sum lst)\n  (cond ((null? lst) 0)\n"
        "        (else (+ (car lst) (sum (cdr lst))))))\n",
        "(define (fibonacci n)\n  (if (< n 2)\n      n\n      (+ (fibonacci (- n 1))\n"
        "         (fibonacci (- n 2)))))\n",
        "(define (even? n) (= (remainder n 2) 0))\n(display (even? 4))\n",
    ),
    "bash": (
        "#!/bin/bash\n\nfactorial() {\n  local n=$1\n  if [ $n -le 1 ]; then\n    echo 1\n"
        "  else\n    echo $((n * $(factorial $((n - 1)))))\n  fi\n}\n\nfactorial 5\n",
        'read -p "Enter a number: " num\nfact=1\nfor ((i=1; i<=num; i++)); do\n'
        '  fact=$((fact * i))\ndone\necho "The factorial of $num is $fact"\n',
        '# Count the lines of each file\nfor file in "$@"; do\n  if test -f "$file"; then\n'
        '    wc -l "$file"\n  else\n    echo "$file: not found" >&2\n    exit 1\n  fi\n'
        "done\n",
        'fibonacci() {\n  if [ "$1" -lt 2 ]; then\n    echo "$1"\n  else\n'
        "    echo $(( $(fibonacci $(( $1 - 1 ))) + $(fibonacci $(( $1 - 2 ))) ))\n  fi\n}\n",
        "#!/bin/sh\nsum=0\nwhile [ $sum -lt 10 ]\ndo\n    sum=`expr $sum + 1`\ndone\necho $sum\n",
    ),
    "ocaml": (
        "let rec factorial n =\n  if n = 0 then 1\n  else n * factorial (n - 1)\n\n"
        'let () = Printf.printf "%d\\n" (factorial 5)\n',
        "let rec fact = function\n  | 0 -> 1\n  | n -> n * fact (n - 1);;\n\nfact 5;;\n",
        "(* Sum of a list *)\nlet rec sum lst =\n  match lst with\n  | [] -> 0\n"
        "  | x :: xs -> x + sum xs\n",
        "let rec fib n =\n  if n < 2 then n\n  else fib (n - 1) + fib (n - 2)\n\n"
        "let _ = print_int (fib 10)\n",
        "let is_even n = n mod 2 = 0\n\nlet evens = List.filter is_even [1; 2; 3; 4]\n",
    ),
    "java": (
        "public class Factorial {\n    public static int factorial(int n) {\n"
        "        if (n == 0) {\n            return 1;\n        }\n"
        "        return n * factorial(n - 1);\n    }\n}\n",
        "public static long factorial(int n) {\n    long result = 1;\n"
        "    for (int i = 2; i <= n; i++) {\n        result *= i;\n    }\n"
        "    return result;\n}\n",
        "import java.util.Scanner;\n\npublic class Main {\n"
        "    public static void main(String[] args) {\n"
        "        Scanner scanner = new Scanner(System.in);\n"
        "        int n = scanner.nextInt();\n        System.out.println(fact(n));\n    }\n"
        "}\n",
        "public int fibonacci(int n) {\n    if (n < 2) {\n        return n;\n    }\n"
        "    return fibonacci(n - 1) + fibonacci(n - 2);\n}\n",
        "public class HelloWorld {\n    public static void main(String[] args) {\n"
        "        int[] numbers = {3, 1, 2};\n        Arrays.sort(numbers);\n"
        "        System.out.println(Arrays.toString(numbers));\n    }\n}\n",
    ),
    "php": (
        "<?php\nfunction factorial($n) {\n    if ($n <= 1) {\n        return 1;\n    }\n"
        "    return $n * factorial($n - 1);\n}\n\necho factorial(5);\n?>\n",
        "function factorial($n) {\n  $result = 1;\n  for ($i = 1; $i <= $n; $i++) {\n"
        "    $result *= $i;\n  }\n  return $result;\n}\n",
        "class Calculator {\n    public function sum($numbers) {\n        $total = 0;\n"
        "        foreach ($numbers as $number) {\n            $total += $number;\n"
        "        }\n        return $total;\n    }\n}\n",
        "<?php\n\nfunction fibonacci(int $n): int\n{\n    if ($n < 2) {\n"
        "        return $n;\n    }\n    return fibonacci($n - 1) + fibonacci($n - 2);\n}\n",
        "$numbers = [3, 1, 2];\nsort($numbers);\nforeach ($numbers as $n) {\n"
        "    echo $n . PHP_EOL;\n}\n",
    ),
    "cpp": (
        "#include <iostream>\nusing namespace std;\n\nint factorial(int n) {\n"
        "    if (n == 0) return 1;\n    return n * factorial(n - 1);\n}\n\nint main() {\n"
        "    cout << factorial(5) << endl;\n    return 0;\n}\n",
        "#include <vector>\n\nint sum(const std::vector<int>& values) {\n"
        "    int total = 0;\n    for (const auto& value : values) {\n"
        "        total += value;\n    }\n    return total;\n}\n",
        "template <typename T>\nclass Stack {\npublic:\n    void push(const T& item) {\n"
        "        items.push_back(item);\n    }\nprivate:\n    std::vector<T> items;\n};\n",
        "#include <iostream>\n#include <algorithm>\n\nint main() {\n"
        "    std::vector<int> numbers{3, 1, 2};\n"
        "    std::sort(numbers.begin(), numbers.end());\n"
        '    std::cout << numbers[0] << "\\n";\n}\n',
        "bool isPrime(int n) {\n    for (int i = 2; i * i <= n; ++i) {\n"
        "        if (n % i == 0) return false;\n    }\n    return true;\n}\n\n"
        "int main() {\n    std::cout << isPrime(7) << std::endl;\n}\n",
    ),
    "csharp": (
        "using System;\n\nnamespace Factorial\n{\n    class Program\n    {\n"
        "        static void Main(string[] args)\n        {\n"
        "            Console.WriteLine(Factorial(5));\n        }\n    }\n}\n",
        "public static int Factorial(int n)\n{\n    if (n == 0)\n    {\n        return 1;\n"
        "    }\n    return n * Factorial(n - 1);\n}\n",
        "public class Stack<T>\n{\n    private List<T> items = new List<T>();\n\n"
        "    public int Count { get { return items.Count; } }\n\n"
        "    public void Push(T item)\n    {\n        items.Add(item);\n    }\n}\n",
        "public int Fibonacci(int n)\n{\n    if (n < 2)\n        return n;\n"
        "    return Fibonacci(n - 1) + Fibonacci(n - 2);\n}\n",
        "var numbers = new int[] { 3, 1, 2 };\nArray.Sort(numbers);\n"
        'Console.WriteLine(string.Join(", ", numbers));\n',
    ),
    "c": (
        "#include <stdio.h>\n\nint factorial(int n) {\n    if (n == 0)\n        return 1;\n"
        "    return n * factorial(n - 1);\n}\n\nint main(void) {\n"
        '    printf("%d\\n", factorial(5));\n    return 0;\n}\n',
        "unsigned long factorial(unsigned int n)\n{\n    unsigned long result = 1;\n"
        "    while (n > 1)\n        result *= n--;\n    return result;\n}\n",
        "void reverse(char *s)\n{\n    size_t i = 0, j = strlen(s) - 1;\n"
        "    while (i < j) {\n        char tmp = s[i];\n        s[i++] = s[j];\n"
        "        s[j--] = tmp;\n    }\n}\n",
        "int fibonacci(int n)\n{\n    if (n < 2)\n        return n;\n"
        "    return fibonacci(n - 1) + fibonacci(n - 2);\n}\n",
        "#include <stdio.h>\n\nint main() {\n    int numbers[] = {3, 1, 2};\n"
        '    for (int i = 0; i < 3; i++) {\n        printf("%d ", numbers[i]);\n    }\n'
        "    return 0;\n}\n",
    ),
    "python": (
        "def factorial(n):\n    if n == 0:\n        return 1\n    else:\n"
        "        return n * factorial(n - 1)\n\nprint(factorial(5))\n",
        "def factorial(n):\n    result = 1\n    for i in range(1, n + 1):\n"
        "        result *= i\n    return result\n",
        'class Stack:\n    """A stack."""\n\n    def __init__(self):\n'
        "        self.items = []\n\n    def push(self, item):\n"
        "        self.items.append(item)\n",
        "def fibonacci(n):\n    if n < 2:\n        return n\n"
        "    return fibonacci(n - 1) + fibonacci(n - 2)\n",
        "numbers = [3, 1, 2]\nnumbers.sort()\nfor number in numbers:\n    print(number)\n",
    ),
    "text": (
        "The factorial of a number n is the product of all positive integers less than "
        "or equal to n. For example, the factorial of 5 is 5 * 4 * 3 * 2 * 1 = 120.\n",
        "To compute the factorial of n, you can use a loop or a recursive function. Here "
        "is how it works: the function calls itself with n - 1 until it reaches 0.\n",
        "I'm sorry, but I can't help with that. Could you please tell me which language "
        "you would like to use, and what the function should return?\n",
        "A prime number is a number that can only be divided by itself and one. To check "
        "it, we try all smaller numbers.\n",
        "Fibonacci numbers are the sequence in which each number is the sum of the two "
        "before it. Would you like to see an example in Python?\n",
    ),
}


@pytest.fixture(scope="module")
def parts() -> Split:
    return split(demo_text())


@pytest.fixture(scope="module")
def detector(parts: Split) -> LanguageDetector:
    return LanguageDetector().fit(parts.held_out)


def snippets(stretches: list[str]) -> Iterator[str]:
    """Whole lines of code, of 40 to about 400 characters when runs of blanks count as one."""
    sizes = itertools.cycle((40, 60, 100, 150, 250, 400))
    for stretch in stretches:
        snippet, size = "", next(sizes)
        for line in stretch.splitlines(keepends=True):
            if not line.strip() or line.lstrip().startswith(
                ("# ", "//", "/*", "* ", ";", "--", "(*")
            ):
                continue
            snippet += line
            if len(" ".join(snippet.split())) >= size:
                yield snippet
                snippet, size = "", next(sizes)


def missed(detector: LanguageDetector, language: str, texts: list[str]) -> list[str]:
    return [text for text in texts if detector.detect(text) != language]


@pytest.mark.parametrize("language", CANDIDATES)
def test_code_that_the_detector_never_saw_is_recognised(
    language: str, parts: Split, detector: LanguageDetector
) -> None:
    unseen = list(snippets(parts.train[language]))
    assert len(unseen) >= 35
    assert len(missed(detector, language, unseen)) <= len(unseen) / 10


def test_typical_answers_are_recognised(detector: LanguageDetector) -> None:
    wrong = {
        language: found
        for language, answers in ANSWERS.items()
        if (found := missed(detector, language, list(answers)))
    }
    assert sum(map(len, wrong.values())) <= sum(map(len, ANSWERS.values())) / 20, wrong
    assert all(len(found) <= 1 for found in wrong.values()), wrong


def test_answers_cut_short_are_recognised(detector: LanguageDetector) -> None:
    cut = [(language, text[:60]) for language, answers in ANSWERS.items() for text in answers]
    wrong = [(language, text) for language, text in cut if detector.detect(text) != language]
    assert len(wrong) <= len(cut) / 10, wrong


def test_answers_are_not_among_the_idioms() -> None:
    for language, answers in ANSWERS.items():
        for answer in answers:
            assert answer.strip() not in IDIOMS[language]


def test_every_language_of_the_text_is_known(detector: LanguageDetector) -> None:
    assert set(detector.languages) == {*TEXT_FILES, "text"}
    assert len(detector.languages) >= 12


def test_the_best_score_is_what_is_detected(detector: LanguageDetector) -> None:
    scores = detector.scores("fn main() { let mut x = 1; }")
    assert set(scores) == set(detector.languages)
    assert max(scores, key=scores.__getitem__) == "rust"
    assert detector.detect("fn main() { let mut x = 1; }") == "rust"


@pytest.mark.parametrize("nothing", ["", " \n\t\n"])
def test_nothing_to_tell_by_is_text(nothing: str, detector: LanguageDetector) -> None:
    assert detector.detect(nothing) == "text"


def test_a_language_without_idioms_is_learned_from_its_texts() -> None:
    detector = LanguageDetector().fit(
        {"forth": [": square dup * ; : cube dup square * ; 5 square .\n"]}
    )
    assert "forth" in detector.languages
    assert detector.detect(": double dup + ; 4 double .\n") == "forth"


def test_fitting_again_forgets() -> None:
    detector = LanguageDetector().fit({"forth": [": square dup * ;\n"]}).fit({})
    assert detector.languages == tuple(sorted(IDIOMS))


def test_a_detector_that_was_not_fitted_is_refused() -> None:
    with pytest.raises(UsageError, match="call fit"):
        LanguageDetector().detect("x = 1")


def test_most_of_the_text_is_for_training(parts: Split) -> None:
    for language, train in parts.train.items():
        kept, held = sum(map(len, train)), sum(map(len, parts.held_out[language]))
        assert 0.65 <= kept / (kept + held) <= 0.85, language


def test_the_halves_share_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "lua"
    folder.mkdir()
    lines = [f"x{number} = {number}\n" for number in range(3000)]
    (folder / "a.lua").write_text("".join(lines[:1800]))
    (folder / "b.lua").write_text("".join(lines[1800:]))
    parts = split(tmp_path)
    train = "".join(parts.train["lua"]).splitlines(keepends=True)
    held_out = "".join(parts.held_out["lua"]).splitlines(keepends=True)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(lines)


def test_the_split_is_the_same_every_time(parts: Split, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    # Another order of creation, which some file systems list files in.
    for file in sorted(demo_text().glob("ruby/*"), reverse=True):
        (copy / "ruby").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy / "ruby")
    again = split(copy, ["ruby"])
    assert again == Split({"ruby": parts.train["ruby"]}, {"ruby": parts.held_out["ruby"]})


@pytest.mark.parametrize("language", CANDIDATES)
def test_no_licence_is_left(language: str, parts: Split) -> None:
    text = "".join(parts.train[language] + parts.held_out[language])
    assert "WITHOUT ANY WARRANTY" not in text
    assert "General Public License" not in text


def test_long_comments_go_and_short_ones_stay(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "a.c").write_text(
        "/* This\n   is\n   a licence. */\n#include <a.h>\n#include <b.h>\n#include <c.h>\n"
        "// one\n// two\nint x;\n// one\n// two\n// three\nint y; /* why */\nint (*f)(int);\n"
    )
    train = "".join(split(tmp_path, ["c"]).train["c"])
    assert train.strip() == (
        "#include <a.h>\n#include <b.h>\n#include <c.h>\n"
        "// one\n// two\nint x;\nint y; /* why */\nint (*f)(int);"
    )


def test_a_language_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ruby").mkdir()
    with pytest.raises(UsageError, match="ruby has no files"):
        split(tmp_path, ["ruby"])
    with pytest.raises(UsageError, match="cobol has no files"):
        split(tmp_path, ["cobol"])
    with pytest.raises(UsageError, match="not a folder"):
        split(tmp_path / "none")
