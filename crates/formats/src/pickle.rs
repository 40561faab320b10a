//! The subset of pickle that `torch.save` writes for dictionaries of tensors. Nothing is executed: the only "calls" are the ones
//! below, which build descriptions; any other global is an error that names it.

use crate::Dtype;
use std::collections::HashMap;
use std::rc::Rc;

/// A tensor as the pickle describes it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PickledTensor {
    pub(crate) dtype: Dtype,
    /// Name of the archive member that holds the storage.
    pub(crate) storage: Rc<str>,
    pub(crate) offset: usize,
    pub(crate) shape: Vec<usize>,
    pub(crate) strides: Vec<usize>,
}

/// What the machine's stack holds.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    None,
    Bool,
    Int(i64),
    Float,
    Text(Rc<str>),
    Bytes,
    Tuple(Rc<Vec<Value>>, Depth),
    List(Rc<Vec<Value>>, Depth),
    Dict(Rc<Vec<(Value, Value)>>, Depth),
    Global(Rc<str>),
    Storage(Dtype, Rc<str>),
    Tensor(Rc<PickledTensor>),
    Mark,
}

/// How many collections are within each other below a value. What nests without end would end the stack when it is dropped.
type Depth = u8;
const DEEPEST: Depth = 200;

impl Value {
    fn depth(&self) -> Depth {
        match self {
            Value::Tuple(_, depth) | Value::List(_, depth) | Value::Dict(_, depth) => *depth,
            _ => 0,
        }
    }
}

/// The depth of a collection of these.
fn around(values: &[Value]) -> Result<Depth> {
    let depth = 1 + values.iter().map(Value::depth).max().unwrap_or(0);
    if depth > DEEPEST { Err("the pickle inside nests deeper than any tensor file does".into()) } else { Ok(depth) }
}

struct Machine<'a> {
    code: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    memo: HashMap<usize, Value>,
}

type Result<T> = std::result::Result<T, String>;

fn damaged() -> String {
    "the pickle inside is truncated or damaged: copy or download the file again".into()
}

/// Runs a pickle and returns its result.
pub(crate) fn load(code: &[u8]) -> Result<Value> {
    let mut m = Machine { code, at: 0, stack: Vec::new(), memo: HashMap::new() };
    loop {
        if let Some(result) = m.step()? {
            return Ok(result);
        }
    }
}

impl Machine<'_> {
    fn bytes(&mut self, n: usize) -> Result<&[u8]> {
        let end = self.at.checked_add(n).filter(|&e| e <= self.code.len()).ok_or_else(damaged)?;
        let bytes = &self.code[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    /// A little-endian unsigned number of n bytes.
    fn number(&mut self, n: usize) -> Result<usize> {
        let bytes = self.bytes(n)?;
        let value = bytes.iter().rev().fold(0u64, |v, &b| v << 8 | b as u64);
        usize::try_from(value).map_err(|_| damaged())
    }

    fn text(&mut self, n: usize) -> Result<Rc<str>> {
        let bytes = self.bytes(n)?;
        std::str::from_utf8(bytes).map(Rc::from).map_err(|_| damaged())
    }

    fn line(&mut self) -> Result<String> {
        let rest = &self.code[self.at..];
        let n = rest.iter().position(|&b| b == b'\n').ok_or_else(damaged)?;
        let line = String::from_utf8_lossy(&rest[..n]).into_owned();
        self.at += n + 1;
        Ok(line)
    }

    fn pop(&mut self) -> Result<Value> {
        match self.stack.pop() {
            None | Some(Value::Mark) => Err(damaged()),
            Some(v) => Ok(v),
        }
    }

    fn pop_n(&mut self, n: usize) -> Result<Vec<Value>> {
        let mut values = (0..n).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
        values.reverse();
        Ok(values)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Value>> {
        let mark = self.stack.iter().rposition(|v| matches!(v, Value::Mark)).ok_or_else(damaged)?;
        let values = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(values)
    }

    fn put(&mut self, key: usize) -> Result<()> {
        let top = self.stack.last().ok_or_else(damaged)?.clone();
        self.memo.insert(key, top);
        Ok(())
    }

    fn get(&mut self, key: usize) -> Result<()> {
        let value = self.memo.get(&key).ok_or_else(damaged)?.clone();
        self.stack.push(value);
        Ok(())
    }

    fn tuple(&mut self, values: Vec<Value>) -> Result<()> {
        let depth = around(&values)?;
        self.stack.push(Value::Tuple(values.into(), depth));
        Ok(())
    }

    fn extend_dict(&mut self, items: Vec<Value>) -> Result<()> {
        let inside = around(&items)?;
        let Some(Value::Dict(dict, depth)) = self.stack.last_mut() else { return Err(damaged()) };
        if !items.len().is_multiple_of(2) {
            return Err(damaged());
        }
        *depth = inside.max(*depth);
        let dict = Rc::make_mut(dict);
        let mut items = items.into_iter();
        while let (Some(k), Some(v)) = (items.next(), items.next()) {
            dict.push((k, v));
        }
        Ok(())
    }

    fn extend_list(&mut self, items: Vec<Value>) -> Result<()> {
        let inside = around(&items)?;
        let Some(Value::List(list, depth)) = self.stack.last_mut() else { return Err(damaged()) };
        *depth = inside.max(*depth);
        Rc::make_mut(list).extend(items);
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) {
        self.stack.push(Value::Global(format!("{module}.{name}").into()));
    }

    /// One instruction; the result at the last.
    fn step(&mut self) -> Result<Option<Value>> {
        match self.bytes(1)?[0] {
            b'.' => return self.pop().map(Some),
            0x80 => {
                self.bytes(1)?;
            }
            0x95 => {
                self.bytes(8)?;
            }
            b'(' => self.stack.push(Value::Mark),
            b'0' => {
                self.stack.pop().ok_or_else(damaged)?;
            }
            b'1' => {
                self.pop_to_mark()?;
            }
            b'N' => self.stack.push(Value::None),
            0x88 | 0x89 => self.stack.push(Value::Bool),
            b'J' => {
                let v = self.number(4)? as u32 as i32;
                self.stack.push(Value::Int(v.into()));
            }
            b'K' => {
                let v = self.number(1)?;
                self.stack.push(Value::Int(v as i64));
            }
            b'M' => {
                let v = self.number(2)?;
                self.stack.push(Value::Int(v as i64));
            }
            0x8a => {
                let n = self.number(1)?;
                let bytes = self.bytes(n)?;
                if n > 8 {
                    return Err("a number in the pickle does not fit 64 bits".into());
                }
                let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
                let mut wide = if negative { [0xff; 8] } else { [0; 8] };
                wide[..n].copy_from_slice(bytes);
                self.stack.push(Value::Int(i64::from_le_bytes(wide)));
            }
            b'G' => {
                self.bytes(8)?;
                self.stack.push(Value::Float);
            }
            code @ (b'X' | 0x8c | 0x8d | b'T' | b'U') => {
                let n = self.number(match code {
                    0x8c | b'U' => 1,
                    0x8d => 8,
                    _ => 4,
                })?;
                let text = self.text(n)?;
                self.stack.push(Value::Text(text));
            }
            code @ (b'C' | b'B') => {
                let n = self.number(if code == b'C' { 1 } else { 4 })?;
                self.bytes(n)?;
                self.stack.push(Value::Bytes);
            }
            b')' => self.stack.push(Value::Tuple(Rc::default(), 1)),
            b']' => self.stack.push(Value::List(Rc::default(), 1)),
            b'}' => self.stack.push(Value::Dict(Rc::default(), 1)),
            code @ 0x85..=0x87 => {
                let values = self.pop_n(code as usize - 0x84)?;
                self.tuple(values)?;
            }
            b't' => {
                let values = self.pop_to_mark()?;
                self.tuple(values)?;
            }
            b's' => {
                let items = self.pop_n(2)?;
                self.extend_dict(items)?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.extend_dict(items)?;
            }
            b'a' => {
                let items = self.pop_n(1)?;
                self.extend_list(items)?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.extend_list(items)?;
            }
            b'q' => {
                let key = self.number(1)?;
                self.put(key)?;
            }
            b'r' => {
                let key = self.number(4)?;
                self.put(key)?;
            }
            0x94 => self.put(self.memo.len())?,
            b'h' => {
                let key = self.number(1)?;
                self.get(key)?;
            }
            b'j' => {
                let key = self.number(4)?;
                self.get(key)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(&module, &name);
            }
            0x93 => match &self.pop_n(2)?[..] {
                [Value::Text(module), Value::Text(name)] => self.global(module, name),
                _ => return Err(damaged()),
            },
            b'Q' => {
                let id = self.pop()?;
                self.stack.push(storage(&id)?);
            }
            b'R' => {
                let args = self.pop_n(2)?;
                self.stack.push(call(&args[0], &args[1])?);
            }
            // Attributes of an object (an OrderedDict's _metadata): of no use here.
            b'b' => {
                self.pop()?;
            }
            code => return Err(format!("the pickle inside uses instruction {code:#04x}, which no tensor file needs")),
        }
        Ok(None)
    }
}

/// ("storage", type, member, device, elements).
fn storage(id: &Value) -> Result<Value> {
    let Value::Tuple(id, _) = id else { return Err(damaged()) };
    let [Value::Text(kind), Value::Global(class), Value::Text(key), ..] = &id[..] else { return Err(damaged()) };
    if &**kind != "storage" {
        return Err(damaged());
    }
    let dtype = match &**class {
        "torch.DoubleStorage" => Dtype::F64,
        "torch.FloatStorage" => Dtype::F32,
        "torch.HalfStorage" => Dtype::F16,
        "torch.BFloat16Storage" => Dtype::BF16,
        "torch.LongStorage" => Dtype::I64,
        "torch.IntStorage" => Dtype::I32,
        "torch.ShortStorage" => Dtype::I16,
        "torch.CharStorage" => Dtype::I8,
        "torch.ByteStorage" => Dtype::U8,
        "torch.BoolStorage" => Dtype::Bool,
        other => return Err(format!("tensors of {other} are not supported")),
    };
    Ok(Value::Storage(dtype, key.clone()))
}

/// The calls that may occur.
fn call(function: &Value, args: &Value) -> Result<Value> {
    let (Value::Global(function), Value::Tuple(args, _)) = (function, args) else { return Err(damaged()) };
    match (&**function, &args[..]) {
        ("collections.OrderedDict", []) => Ok(Value::Dict(Rc::default(), 1)),
        (
            "torch._utils._rebuild_tensor_v2",
            [Value::Storage(dtype, storage), Value::Int(offset), shape, strides, ..],
        ) => {
            let numbers = |v: &Value| -> Result<Vec<usize>> {
                let (Value::Tuple(v, _) | Value::List(v, _)) = v else { return Err(damaged()) };
                let number = |v: &Value| match v {
                    Value::Int(i) => usize::try_from(*i).map_err(|_| damaged()),
                    _ => Err(damaged()),
                };
                v.iter().map(number).collect()
            };
            let (shape, strides) = (numbers(shape)?, numbers(strides)?);
            if shape.len() != strides.len() {
                return Err(damaged());
            }
            let offset = usize::try_from(*offset).map_err(|_| damaged())?;
            Ok(Value::Tensor(Rc::new(PickledTensor {
                dtype: *dtype,
                storage: storage.clone(),
                offset,
                shape,
                strides,
            })))
        }
        ("torch._utils._rebuild_parameter", [tensor @ Value::Tensor(_), ..]) => Ok(tensor.clone()),
        ("collections.OrderedDict" | "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_parameter", _) => {
            Err(damaged())
        }
        (other, _) => Err(format!(
            "the file wants to call {other}, which is not part of a plain tensor file; nothing was executed. Save only the state_dict of the model"
        )),
    }
}
