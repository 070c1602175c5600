"""A few lines of each language, for what tens of kilobytes of one project do not show of it."""

from collections.abc import Mapping
from types import MappingProxyType

IDIOMS: Mapping[str, str] = MappingProxyType(
    {
        "bash": r"""#!/bin/bash
set -e
greet() {
  local name="$1"
  echo "Hello, ${name}"
  return 0
}
if [ -z "$1" ]; then exit 1; elif [[ $x == "y" ]]; then shift; fi
while read -r line; do printf "%s\n" "$line"; done < "$file"
for f in *.txt; do cat "$f" | grep -v x | awk '{print $2}'; done
case "$1" in start) ;; *) echo usage >&2 ;; esac
count=$((count + 1))
export PATH
""",
        "c": r"""#include <stdlib.h>
#include <string.h>
#define MAX 10
typedef struct node { int value; struct node *next; } Node;
static int compare(const void *a, const void *b) { return *(int *)a - *(int *)b; }
int main(int argc, char *argv[]) {
    char buffer[64];
    int *p = malloc(sizeof(int) * MAX);
    if (p == NULL) return -1;
    scanf("%d", &p[0]);
    printf("%s: %d\n", buffer, p->value);
    free(p);
    return 0;
}
int sum(int *v, int n) {
    int i, total = 0;
    for (i = 0; i < n; i++) {
        total += v[i];
    }
    if (total > 100) {
        return 100;
    }
    while (n > 0) n--;
    return total;
}
""",
        "cpp": r"""#include <string>
#include <algorithm>
using namespace std;
namespace app {
template <class T> T max(T a, T b) { return a > b ? a : b; }
class Shape : public Base {
public:
    Shape(const std::string& name) : name_(name) {}
    virtual ~Shape() {}
    double area() const override;
private:
    std::string name_;
};
}
void Shape::print() { std::cout << "x: " << x << std::endl; cin >> n; }
std::vector<int> v = {1, 2}; std::map<string, int> m; auto it = v.begin(); v.push_back(1);
bool ok = nullptr; delete p; return static_cast<int>(v.size());
int sum(vector<int>& v, int n) {
    int total = 0;
    for (int i = 0; i < n; i++) {
        total += v[i];
    }
    if (total > 100) {
        return 100;
    }
    return total;
}
""",
        "csharp": r"""using System;
using System.Collections.Generic;
using System.Linq;
namespace App
{
    public class Person : IPerson
    {
        private readonly string _name;
        public string Name { get; set; }
        public Person(string name) { _name = name; }
        public override string ToString() { return $"{Name}"; }
        public static void Main(string[] args)
        {
            var list = new List<string>();
            foreach (var item in list) { Console.WriteLine("Hello " + item); }
            int n = int.Parse(Console.ReadLine());
            bool empty = list.Count == 0 || string.IsNullOrEmpty(name);
        }
    }
}
    public static int Sum(int[] v, int n)
    {
        int total = 0;
        for (int i = 0; i < n; i++)
        {
            total += v[i];
        }
        if (total > 100)
        {
            return 100;
        }
        while (n > 0) { n--; }
        return total;
    }
""",
        "haskell": r"""module Main where
import qualified Data.Map as Map
data Tree a = Leaf | Node (Tree a) a (Tree a) deriving (Show, Eq)
main :: IO ()
main = do
  line <- getLine
  putStrLn ("Hello, " ++ line)
  mapM_ print $ map (*2) [1..10]
length' :: [a] -> Int
length' [] = 0
length' (_:xs) = 1 + length' xs
f :: (Ord a) => a -> Maybe a -> Bool
f x y | x > 0 = True
      | otherwise = False
  where z = foldr (\x acc -> x + acc) 0 . filter even
case m of { Just v -> v; Nothing -> 0 }
let g = fst in g
""",
        "java": r"""package com.example;
import java.util.List;
import java.util.ArrayList;
public class Person implements Comparable<Person> {
    private final String name;
    private int age = 0;
    public Person(String name) { this.name = name; }
    public String getName() { return name; }
    @Override
    public boolean equals(Object o) { return o instanceof Person; }
    public static void main(String[] args) throws Exception {
        List<String> list = new ArrayList<>();
        for (String s : list) { System.out.println("Hello " + s.length()); }
        if (list.isEmpty()) { throw new IllegalArgumentException("empty"); }
    }
    public static int max(int a, int b) { return Math.max(a, b); }
}
    private static int sum(int[] v, int n) {
        int total = 0;
        for (int i = 0; i < n; i++) {
            total += v[i];
        }
        if (total > 100) {
            return 100;
        } else {
            while (n > 0) { n--; }
        }
        return total;
    }
""",
        "javascript": r"""const fs = require("fs");
function add(a, b) {
  let sum = a + b;
  var total = 0;
  return sum === undefined ? null : total;
}
const square = (x) => x * x;
async function load(url) { const r = await fetch(url); return r.json(); }
class Animal { constructor(name) { this.name = name; } speak() { console.log(`Hi ${this.name}`); } }
for (let i = 0; i < list.length; i++) { list.push(i); }
document.getElementById("x").addEventListener("click", function () {});
module.exports = { add }; list.map(x => x + 1).forEach(console.log);
if (typeof x !== "string") { throw new Error("bad"); }
function sum(v, n) {
  let total = 0;
  for (let i = 0; i < n; i++) {
    total += v[i];
  }
  if (total > 100) {
    return 100;
  }
  return total;
}
""",
        "lua": r"""local M = {}
function M.add(a, b)
  local sum = a + b
  return sum
end
for i = 1, #list do
  print(list[i] .. " " .. i)
end
for k, v in pairs(t) do
  if k ~= nil then table.insert(t, v) elseif v == true then break end
end
local f = function(x) return x and y or nil end
repeat until not x
io.write(string.format("%d", n))
while n > 0 do n = n - 1 end
""",
        "ocaml": r"""open List
type 'a tree = Leaf | Node of 'a tree * 'a * 'a tree
let square x = x * x;;
let rec length l = match l with
  | [] -> 0
  | _ :: t -> 1 + length t
let rec insert x = function
  | Leaf -> Node (Leaf, x, Leaf)
  | Node (l, y, r) when x < y -> Node (insert x l, y, r)
let () =
  let n = read_int () in
  print_endline "hello"; List.iter (fun x -> Printf.printf "%d " x) xs;
  print_string (string_of_int n); r := !r + 1
if a <> b then begin a end else raise (Failure "x")
""",
        "perl": r"""#!/usr/bin/perl
use strict;
use warnings;
my %h = (a => 1); my @a = (1, 2, 3); my ($x, $y) = @_;
sub add { my ($self, $n) = @_; return $self->{total} + $n; }
foreach my $key (sort keys %h) { print "$key = $h{$key}\n"; }
while (my $line = <STDIN>) { chomp $line; next unless $line =~ /^\d+$/; push @a, $1; }
if ($x eq "y") { die "bad: $!"; } elsif (defined $x) { $x =~ s/a/b/g; }
my $n = scalar(@a); my $s = shift; return unless @a; join(",", @$ref); printf("%d", $a[0]);
for (my $i = 0; $i < @a; $i++) { $sum += $a[$i]; }
1;
sub sum {
    my ($v, $n) = @_;
    my $total = 0;
    for my $i (0 .. $n - 1) {
        $total += $v->[$i];
    }
    if ($total > 100) {
        return 100;
    }
    return $total;
}
""",
        "php": r"""<?php
namespace App;
function add($a, $b) { $sum = $a + $b; return $sum; }
$list = array(1, 2, 3); $map = ['a' => 1];
foreach ($list as $key => $value) { echo "$key: $value\n"; }
for ($i = 0; $i < count($list); $i++) { echo $list[$i] . "<br>"; }
class User extends Model {
    private $name;
    public function __construct($name) { $this->name = $name; }
    public static function getName(int $id): string { return $this->name; }
}
if (isset($_GET['x']) && $x === null) { throw new Exception("bad"); } else { print_r($x); }
while ($n > 0) { $n = $n - 1; }
function square(int $x) { return $x * $x; }
$f = function ($x) { return strlen($x); };
?>
function sum($v, $n) {
    $total = 0;
    for ($i = 0; $i < $n; $i++) {
        $total += $v[$i];
    }
    if ($total > 100) {
        return 100;
    }
    return $total;
}
""",
        "python": r'''import os
from typing import List
def add(a, b=None):
    """Add two numbers."""
    if a is None or not b:
        return None
    elif a in b:
        raise ValueError("bad")
    for x in range(len(b)):
        print(f"{x} {b[x]}")
    return [x * 2 for x in b if x > 0]
class Person(Base):
    def __init__(self, name):
        self.name = name
    def get(self): return self.name
try:
    with open(path) as f: data = f.read()
except Exception as e:
    pass
while True: break
f = lambda x: x + 1
if __name__ == "__main__":
    main()
''',
        "ruby": r"""require 'set'
module App
class Person < Base
  attr_reader :name
  def initialize(name)
    @name = name
  end
  def to_s
    "Hello #{@name}"
  end
  def self.create(*args)
    new(*args)
  end
end
end
def add(a, b)
  return nil if a.nil? || b.empty?
  a + b
end
[1, 2, 3].each { |x| puts x }
list.map do |x|
  x * 2
end
5.times { |i| print i }
until n.zero? do n -= 1 end
unless x == y
  raise ArgumentError, "bad"
elsif h[:key] then puts "x"
end
begin
  yield
rescue StandardError => e
  puts "error: #{e.message}"
end
words = %w(a b c).sort_by { |word| word.length }
case x
when 1 then :a
else nil
end
i += 1 while i < words.size
""",
        "rust": r"""use std::collections::HashMap;
#[derive(Debug, Clone)]
pub struct Point { x: f64, y: f64 }
impl Point {
    pub fn new(x: f64, y: f64) -> Self { Point { x, y } }
    fn len(&self) -> usize { self.items.len() }
}
fn add(a: i32, b: i32) -> i32 { a + b }
fn main() {
    let mut v: Vec<i32> = Vec::new();
    let x = 5;
    for i in 0..10 { v.push(i); }
    for x in v.iter() { println!("{}", x); }
    match v.get(0) { Some(n) => println!("{:?}", n), None => (), _ => panic!("bad") }
    if let Some(x) = y { return Ok(x); }
    let s: &str = "a"; let t = String::from(s); let r: Result<u8, String> = s.parse().unwrap();
    while n > 1 { n -= 1; }
}
pub fn sum(v: &[i64], n: usize) -> i64 {
    let mut total = 0;
    for i in 0..n {
        total += v[i];
    }
    if total > 100 {
        return 100;
    }
    total
}
""",
        "scheme": r"""(define (square x) (* x x))
(define pi 3.14)
(define (length lst)
  (if (null? lst)
      0
      (+ 1 (length (cdr lst)))))
(let ((x 1) (y 2))
  (cond ((= x y) #t)
        ((eq? x 'a) (display "hello"))
        (else #f)))
(define (map f l) (cons (f (car l)) (map f (cdr l))))
(let loop ((i 0)) (if (< i 10) (begin (display i) (newline) (loop (+ i 1)))))
(lambda (x y) (set! x (append y '())))
(let* ((a 1)) (list a))
""",
        "text": r"""Here is a simple example of how to do this. The function takes two arguments and
returns their sum. It works by calling itself until the base case is reached.
You can use it as follows. First, we need to define what we want to do; then we
check whether the number is less than one, and if it is, we return it. A list is
a collection of items. In this case, the result is the same as before. Note that
this is not the only way to solve the problem, but it is one of the most common.
I hope that helps! Let me know if you have any other questions. This code will
print the value, for example, when the user gives the number of times. A
function is a block of code that performs a task. The first line tells us how
many elements there are in the list, and each of them is added to the total. If
the number is even, then it is divided by two, otherwise the program stops. This
is because every positive integer can be written as a product of prime numbers.
Sure, I would be happy to help you with that. There are several ways to do it,
but the easiest one is to use a loop from one to the end. Please make sure that
your input is correct before you run it, and remember to save the file. I am an
assistant, and I can answer what you would like to know about the world, your
work or the language.
""",
    }
)
