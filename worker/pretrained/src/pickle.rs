//! The few words of Python's pickle language that a file of tensors needs.
//!
//! A pickle is a program, and Python's own reader would run whatever it names. This one builds
//! dictionaries, tuples, texts and numbers; of all functions it knows the one that makes a tensor
//! of a storage and the one that makes a dictionary, and of those it only notes what they were
//! given. Anything else is refused by its name. Sizes are bounded by the file's, depth by
//! [`DEEPEST`].

use crate::Dtype;
use std::collections::HashMap;
use std::rc::Rc;

/// Tuples and lists within each other. A tensor's description needs three.
const DEEPEST: u32 = 16;

/// A tensor as a pickle describes it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Described {
    /// Name of the storage in the archive.
    pub(crate) storage: Rc<str>,
    pub(crate) dtype: Dtype,
    /// Elements of the storage.
    pub(crate) elements: u64,
    /// The first element within the storage.
    pub(crate) first: u64,
    pub(crate) shape: Vec<u64>,
}

#[derive(Clone, Debug)]
enum Value {
    /// None, booleans, and whatever else is not looked at.
    Nothing,
    Int(i64),
    Text(Rc<str>),
    /// A tuple or a list.
    Many(Rc<Vec<Value>>, u32),
    /// A dictionary that may still grow: it is not taken out of the memory again.
    Map(Vec<(Value, Value)>),
    /// A function or class, by module and name.
    Global(Rc<str>),
    Storage(Rc<str>, Dtype, u64),
    Tensor(Rc<Described>),
}

impl Value {
    fn depth(&self) -> u32 {
        if let Self::Many(_, depth) = self { *depth } else { 0 }
    }

    fn many(items: Vec<Self>) -> Result<Self, String> {
        let depth = 1 + items.iter().map(Self::depth).max().unwrap_or(0);
        if depth > DEEPEST {
            return Err(format!("tuples lie {depth} deep in each other"));
        }
        // Dictionaries lie in nothing, so that there is no depth of them to bound.
        let flat = |item| if matches!(item, Self::Map(_)) { Self::Nothing } else { item };
        Ok(Self::Many(Rc::new(items.into_iter().map(flat).collect()), depth))
    }

    fn items(&self) -> Result<&[Self], String> {
        match self {
            Self::Many(items, _) => Ok(items),
            other => Err(format!("there is {} where a tuple must be", other.kind())),
        }
    }

    fn number(&self) -> Result<u64, String> {
        match self {
            Self::Int(number) => u64::try_from(*number).map_err(|_| format!("{number} is no size")),
            other => Err(format!("there is {} where a size must be", other.kind())),
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Nothing => "something else",
            Self::Int(_) => "a number",
            Self::Text(_) => "a text",
            Self::Many(..) => "a tuple",
            Self::Map(_) => "a dictionary",
            Self::Global(_) => "a name of Python",
            Self::Storage(..) => "a storage",
            Self::Tensor(_) => "a tensor",
        }
    }
}

/// The tensors of a pickled state dictionary, by name, in its order.
///
/// # Errors
/// Where it is something else, damaged, or needs code to be run.
pub(crate) fn read(bytes: &[u8]) -> Result<Vec<(String, Described)>, String> {
    let mut machine = Machine { rest: bytes, stack: Vec::new(), marks: Vec::new(), memory: HashMap::new() };
    let top = machine.run()?;
    let Value::Map(entries) = top else {
        return Err(format!("it holds {}, not a dictionary of tensors", top.kind()));
    };
    let mut tensors = Vec::with_capacity(entries.len());
    for (key, value) in entries {
        match (key, value) {
            (Value::Text(name), Value::Tensor(tensor)) => tensors.push((name.to_string(), (*tensor).clone())),
            (Value::Text(name), other) => return Err(format!("{name:?} is {}, not a tensor", other.kind())),
            (other, _) => return Err(format!("a key of its dictionary is {}, not a text", other.kind())),
        }
    }
    Ok(tensors)
}

struct Machine<'a> {
    rest: &'a [u8],
    stack: Vec<Value>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memory: HashMap<u64, Value>,
}

impl Machine<'_> {
    fn run(&mut self) -> Result<Value, String> {
        loop {
            let [op] = self.take()?;
            if op == b'.' {
                return self.pop();
            }
            self.step(op)?;
        }
    }

    fn step(&mut self, op: u8) -> Result<(), String> {
        match op {
            0x80 => drop(self.take::<1>()?), // PROTO
            0x95 => drop(self.take::<8>()?), // FRAME
            b'(' => self.marks.push(self.stack.len()),
            b')' | b']' => self.push(Value::many(Vec::new())?),
            b'}' => self.push(Value::Map(Vec::new())),
            b'N' | 0x88 | 0x89 => self.push(Value::Nothing), // NONE, NEWTRUE, NEWFALSE
            b'G' => {
                self.take::<8>()?; // BINFLOAT
                self.push(Value::Nothing);
            }
            b'K' | b'M' | b'J' | 0x8a => self.number(op)?,
            b'X' | 0x8c | 0x8d => self.text(op)?,
            b'q' | b'r' | 0x94 | b'h' | b'j' => self.memory(op)?,
            b't' | 0x85 | 0x86 | 0x87 => self.tuple(op)?,
            b'c' | 0x93 => self.global(op)?,
            b'Q' => self.storage()?,
            b'R' => self.reduce()?,
            b's' | b'u' => self.set_items(op)?,
            b'a' | b'e' => self.append(op)?,
            b'b' => drop(self.pop()?), // BUILD: attributes of a dictionary, which nobody reads
            b'0' => drop(self.pop()?),
            other => {
                return Err(format!("it has the instruction {other:#04x}, which files of tensors need not"));
            }
        }
        Ok(())
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or("it ends in the middle")?;
        self.rest = rest;
        Ok(*head)
    }

    fn bytes(&mut self, n: u64) -> Result<&[u8], String> {
        let n = usize::try_from(n).map_err(|_| "it ends in the middle")?;
        let (head, rest) = self.rest.split_at_checked(n).ok_or("it ends in the middle")?;
        self.rest = rest;
        Ok(head)
    }

    /// Up to the end of the line.
    fn line(&mut self) -> Result<String, String> {
        let end = self.rest.iter().position(|b| *b == b'\n').ok_or("it ends in the middle")?;
        let line = utf8(&self.rest[..end])?;
        self.rest = &self.rest[end + 1..];
        Ok(line)
    }

    fn push(&mut self, value: Value) {
        self.stack.push(value);
    }

    fn pop(&mut self) -> Result<Value, String> {
        // Nothing below a mark is taken without taking the mark.
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("it takes more than it has put down".into());
        }
        self.stack.pop().ok_or_else(|| "it takes more than it has put down".into())
    }

    fn since_mark(&mut self) -> Result<Vec<Value>, String> {
        let mark = self.marks.pop().ok_or("it closes what it has not opened")?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn number(&mut self, op: u8) -> Result<(), String> {
        let number = match op {
            b'K' => i64::from(self.take::<1>()?[0]),
            b'M' => i64::from(u16::from_le_bytes(self.take()?)),
            b'J' => i64::from(i32::from_le_bytes(self.take()?)),
            _ => {
                let [n] = self.take()?;
                let bytes = self.bytes(u64::from(n))?;
                if bytes.len() > 8 {
                    return Err(format!("it has a number of {n} bytes"));
                }
                // Two's complement, little-endian: the last byte's sign goes on.
                let sign = bytes.last().is_some_and(|b| *b > 0x7f);
                let mut wide = [if sign { 0xff } else { 0 }; 8];
                wide[..bytes.len()].copy_from_slice(bytes);
                i64::from_le_bytes(wide)
            }
        };
        self.push(Value::Int(number));
        Ok(())
    }

    fn text(&mut self, op: u8) -> Result<(), String> {
        let n = match op {
            0x8c => u64::from(self.take::<1>()?[0]),
            b'X' => u64::from(u32::from_le_bytes(self.take()?)),
            _ => u64::from_le_bytes(self.take()?),
        };
        let text = utf8(self.bytes(n)?)?;
        self.push(Value::Text(text.into()));
        Ok(())
    }

    fn memory(&mut self, op: u8) -> Result<(), String> {
        let at = match op {
            b'q' | b'h' => u64::from(self.take::<1>()?[0]),
            b'r' | b'j' => u64::from(u32::from_le_bytes(self.take()?)),
            _ => self.memory.len() as u64,
        };
        if matches!(op, b'h' | b'j') {
            let value = self.memory.get(&at).cloned().ok_or("it looks up what it has not stored")?;
            self.push(value);
            return Ok(());
        }
        let top = self.stack.last().ok_or("it stores what is not there")?;
        // A copy of a dictionary would not grow with it, and would be paid for each time.
        let kept = if matches!(top, Value::Map(_)) { Value::Nothing } else { top.clone() };
        self.memory.insert(at, kept);
        Ok(())
    }

    fn tuple(&mut self, op: u8) -> Result<(), String> {
        let items = match op {
            b't' => self.since_mark()?,
            n => {
                let mut items = Vec::new();
                for _ in 0x84..n {
                    items.push(self.pop()?);
                }
                items.reverse();
                items
            }
        };
        self.push(Value::many(items)?);
        Ok(())
    }

    fn global(&mut self, op: u8) -> Result<(), String> {
        let name = if op == b'c' {
            let (module, name) = (self.line()?, self.line()?);
            format!("{module}.{name}")
        } else {
            match (self.pop()?, self.pop()?) {
                (Value::Text(name), Value::Text(module)) => format!("{module}.{name}"),
                _ => return Err("it names a function by what is no text".into()),
            }
        };
        let known = ["collections.OrderedDict", REBUILD, PARAMETER].contains(&name.as_str());
        if !known && dtype_of(&name).is_none() {
            return Err(match name.strip_prefix("torch.").filter(|n| n.ends_with("Storage")) {
                Some(storage) => format!("it has tensors in a {storage}; fp32, bf16 and fp16 are read"),
                None => format!("it wants to run {name}, and nothing from such a file is run"),
            });
        }
        self.push(Value::Global(name.into()));
        Ok(())
    }

    /// A storage by its persistent id: ("storage", class, name, device, elements).
    fn storage(&mut self) -> Result<(), String> {
        let id = self.pop()?;
        let [Value::Text(tag), Value::Global(class), Value::Text(name), _, elements] = id.items()? else {
            return Err("it has a storage of a form that is not known".into());
        };
        let dtype = dtype_of(class).filter(|_| &**tag == "storage");
        let dtype = dtype.ok_or("it has a storage of a kind that is not known")?;
        let storage = Value::Storage(Rc::clone(name), dtype, elements.number()?);
        self.push(storage);
        Ok(())
    }

    fn reduce(&mut self) -> Result<(), String> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Value::Global(name) = function else {
            return Err(format!("it calls {}", function.kind()));
        };
        let arguments = arguments.items()?;
        let made = match (&*name, arguments) {
            ("collections.OrderedDict", []) => Value::Map(Vec::new()),
            (PARAMETER, [tensor @ Value::Tensor(_), ..]) => tensor.clone(),
            (REBUILD, [Value::Storage(storage, dtype, elements), first, shape, strides, ..]) => {
                let list = |v: &Value| v.items()?.iter().map(Value::number).collect::<Result<Vec<_>, _>>();
                let (shape, strides) = (list(shape)?, list(strides)?);
                if !is_contiguous(&shape, &strides) {
                    return Err(format!(
                        "it has a tensor of the shape {shape:?} with the strides {strides:?}: only tensors without gaps \
                         are read; save it again after .contiguous()"
                    ));
                }
                let described = Described {
                    storage: Rc::clone(storage),
                    dtype: *dtype,
                    elements: *elements,
                    first: first.number()?,
                    shape,
                };
                Value::Tensor(Rc::new(described))
            }
            _ => return Err(format!("it calls {name} in a way that is not known")),
        };
        self.push(made);
        Ok(())
    }

    fn set_items(&mut self, op: u8) -> Result<(), String> {
        let items = match op {
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                vec![key, value]
            }
            _ => self.since_mark()?,
        };
        if !items.len().is_multiple_of(2) {
            return Err("it has a key without a value".into());
        }
        let Some(Value::Map(map)) = self.stack.last_mut() else {
            return Err("it sets an entry of what is no dictionary".into());
        };
        let mut items = items.into_iter();
        while let (Some(key), Some(value)) = (items.next(), items.next()) {
            // A dictionary within one is no tensor either.
            let value = if matches!(value, Value::Map(_)) { Value::Nothing } else { value };
            map.push((key, value));
        }
        Ok(())
    }

    /// What is in lists is not looked at.
    fn append(&mut self, op: u8) -> Result<(), String> {
        if op == b'a' { self.pop().map(drop) } else { self.since_mark().map(drop) }
    }
}

const REBUILD: &str = "torch._utils._rebuild_tensor_v2";
const PARAMETER: &str = "torch._utils._rebuild_parameter";

fn dtype_of(class: &str) -> Option<Dtype> {
    Dtype::of_storage(class.strip_prefix("torch.")?)
}

fn utf8(bytes: &[u8]) -> Result<String, String> {
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| "it has a text that is no UTF-8".into())
}

/// Whether elements lie one after the other; the stride of a dimension of one says nothing.
fn is_contiguous(shape: &[u64], strides: &[u64]) -> bool {
    let mut step = 1u64;
    shape.len() == strides.len()
        && shape.iter().zip(strides).rev().all(|(length, stride)| {
            let fits = *length == 1 || *stride == step;
            step = step.saturating_mul(*length);
            fits
        })
}

/// The pickle of a state dictionary, as `torch.save` writes it; storage i is that of tensor i.
pub(crate) fn write<'a>(tensors: impl IntoIterator<Item = (&'a str, &'a [u64], Dtype)>) -> Vec<u8> {
    let mut out = b"\x80\x02}q\x00(".to_vec();
    for (i, (name, shape, dtype)) in tensors.into_iter().enumerate() {
        text(&mut out, name);
        out.extend(format!("c{}\n(", REBUILD.replace("._rebuild", "\n_rebuild")).into_bytes());
        out.push(b'(');
        text(&mut out, "storage");
        out.extend(format!("ctorch\n{}\n", dtype.storage()).into_bytes());
        text(&mut out, &i.to_string());
        text(&mut out, "cpu");
        long(&mut out, shape.iter().product());
        out.extend(b"tQK\x00"); // its tuple, the storage, the first element
        let mut strides = vec![1; shape.len()];
        for d in (1..shape.len()).rev() {
            strides[d - 1] = strides[d] * shape[d];
        }
        for list in [shape, &strides] {
            out.push(b'(');
            list.iter().for_each(|n| long(&mut out, *n));
            out.push(b't');
        }
        out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend(b"u.");
    out
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.bytes());
}

/// A number below 2⁶³, as every size is, as LONG1 of eight bytes.
fn long(out: &mut Vec<u8>, number: u64) {
    out.extend([0x8a, 8]);
    out.extend(number.to_le_bytes());
}
