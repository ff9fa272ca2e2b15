//! A run's steps with a textbook ring instead of the fixed tree, for comparison only.
//!
//! usage: ring RUN_FOLDER MEMBERS SECONDS        (`bench/reduce.py` calls it)
//!
//! The same model, data, batch and kernels as the run in that folder, on as many threads as it
//! would have workers, each with an engine of one compute thread. Gradients are summed by a ring
//! reduce-scatter and weights are gathered by a ring all-gather (Patarasuk & Yuan 2009), piece by
//! piece, so that adding and sending overlap, over plain TCP connections on loopback without
//! frames or checksums. Each member owns one chunk of the model, as with `cluster.redundancy = 1`,
//! so the bytes are the same; the order in which a sum is made depends on the number of members,
//! which is what Caravan does not do. Nobody may die. Prints the time of every step, in
//! milliseconds, and its loss.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use caravan_data::{Dataset, Sampler};
use caravan_engine::{Batches, Checkpoints, Executor, Watch};
use caravan_types::lanes::cover;
use caravan_types::peer::Key;
use caravan_types::task::{Done, Task};
use caravan_types::{
    Generation, Lane, MicroBatch, MicroId, Node, Part, RunSpec, SliceId, SliceSet, SliceTable, Step, Verdict,
};
use std::error::Error;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Elements that are sent, received and added at once: 256 KiB, which stay in a cache.
const PIECE: usize = 1 << 16;

const GENERATION: Generation = Generation(1);

/// The run's data.
struct Sampled(Sampler);

impl Batches for Sampled {
    fn micro_batch(&mut self, step: Step, lane: Lane, index: u32) -> Result<MicroBatch, String> {
        self.0.micro_batch(step, lane, index).map_err(|e| e.to_string())
    }

    fn counted_tokens(&mut self, step: Step) -> Result<u64, String> {
        self.0.counted_tokens(step).map_err(|e| e.to_string())
    }
}

/// Nothing is saved here.
struct Nowhere;

impl Checkpoints for Nowhere {
    fn save(&mut self, _: Generation, _: Step, _: Vec<(SliceId, Vec<f32>)>) -> Option<Done> {
        None
    }

    fn load(&mut self, _: Step, _: &SliceSet) -> Result<Vec<(SliceId, Vec<f32>)>, String> {
        Err("a comparison has no checkpoints".into())
    }
}

/// One member of the ring: it listens to the one before it and sends to the one behind it.
struct Member {
    rank: usize,
    /// The slices of each chunk; there are as many chunks as members.
    chunks: Vec<Vec<SliceId>>,
    lanes: std::ops::Range<Lane>,
    micro_batches: u32,
    engine: Executor<Sampled, Nowhere>,
    before: TcpStream,
    behind: mpsc::Sender<Vec<f32>>,
}

impl Member {
    fn size(&self) -> usize {
        self.chunks.len()
    }

    /// The chunk that is whole here after a reduce-scatter.
    fn own(&self) -> usize {
        (self.rank + 1) % self.size()
    }

    fn send(&self, piece: &[f32]) -> Outcome<()> {
        Ok(self.behind.send(piece.to_vec())?)
    }

    fn receive(&mut self, piece: &mut [f32]) -> Outcome<()> {
        Ok(self.before.read_exact(bytemuck::cast_slice_mut(piece))?)
    }

    /// Sums up chunks around the ring; the own one is whole afterwards.
    fn reduce_scatter(&mut self, chunks: &mut [Vec<f32>]) -> Outcome<()> {
        let (size, mut came) = (self.size(), vec![0.0; PIECE]);
        chunks[self.rank].chunks(PIECE).try_for_each(|piece| self.send(piece))?;
        for turn in 1..size {
            for piece in chunks[(self.rank + size - turn) % size].chunks_mut(PIECE) {
                let came = &mut came[..piece.len()];
                self.receive(came)?;
                piece.iter_mut().zip(came).for_each(|(sum, more)| *sum += *more);
                if turn + 1 < size {
                    self.send(piece)?;
                }
            }
        }
        Ok(())
    }

    /// Passes the own chunk around the ring; all are whole afterwards.
    fn all_gather(&mut self, chunks: &mut [Vec<f32>]) -> Outcome<()> {
        let (size, own) = (self.size(), self.own());
        chunks[own].chunks(PIECE).try_for_each(|piece| self.send(piece))?;
        for turn in 1..size {
            for piece in chunks[(own + size - turn) % size].chunks_mut(PIECE) {
                self.receive(piece)?;
                if turn + 1 < size {
                    self.send(piece)?;
                }
            }
        }
        Ok(())
    }

    /// The sum of what each member has.
    fn sum(&mut self, mine: [f64; 2]) -> Outcome<[f64; 2]> {
        let mut chunks = vec![vec![0.0; 4]; self.size()];
        let own = self.own();
        bytemuck::cast_slice_mut(&mut chunks[own]).copy_from_slice(bytemuck::cast_slice::<f64, u8>(&mine));
        self.all_gather(&mut chunks)?;
        let read = |chunk: &Vec<f32>| bytemuck::pod_read_unaligned::<[f64; 2]>(bytemuck::cast_slice(chunk));
        let all = chunks.iter().map(read);
        Ok(all.fold([0.0; 2], |sum, each| [sum[0] + each[0], sum[1] + each[1]]))
    }

    fn init(&mut self, spec: &RunSpec) -> Outcome<()> {
        let own = self.own();
        self.engine.run(Task::Place { units: 0..spec.model.units(), recompute: false })?;
        for (chunk, slices) in self.chunks.iter().enumerate() {
            let part = if chunk == own { Part::State } else { Part::Weights };
            self.engine.run(Task::Init { slices: slices.iter().copied().collect(), part })?;
        }
        Ok(())
    }

    /// What the engine has under a key for each slice of each chunk.
    fn take(&mut self, key: impl Fn(SliceId) -> Key) -> Outcome<Vec<Vec<f32>>> {
        let mut chunks = Vec::new();
        for slices in &self.chunks {
            let mut chunk = Vec::new();
            for slice in slices {
                chunk.extend(self.engine.get(key(*slice))?);
            }
            chunks.push(chunk);
        }
        Ok(chunks)
    }

    /// One step; the run's loss.
    fn step(&mut self, step: Step, table: &SliceTable, root: Node) -> Outcome<f64> {
        let mut loss = 0.0;
        for lane in self.lanes.clone() {
            for index in 0..self.micro_batches {
                let (generation, micro) = (GENERATION, MicroId { lane, index });
                self.engine.run(Task::Forward { generation, step, micro })?;
                let done = self.engine.run(Task::Backward { generation, step, micro })?;
                if let Some(Done::Lane { result, .. }) = done {
                    loss += result.loss;
                }
            }
        }
        let [node] = cover(self.lanes.clone())[..] else { return Err("lanes must divide evenly".into()) };
        let mut sums = self.take(|slice| Key::Partial { step, slice, node })?;
        self.reduce_scatter(&mut sums)?;
        let (own, mut norm, mut at) = (self.own(), 0.0, 0);
        for slice in self.chunks[own].clone() {
            let len = table.get(slice).map_or(0, caravan_types::Slice::len);
            self.engine.put(Key::Partial { step, slice, node: root }, sums[own][at..at + len].to_vec())?;
            at += len;
            let done = self.engine.run(Task::Reduce { generation: GENERATION, step, slice })?;
            if let Some(Done::Reduced { norms, .. }) = done {
                norm += norms.iter().sum::<f64>();
            }
        }
        let [norm, loss] = self.sum([norm, loss])?;
        let slices: SliceSet = self.chunks[own].iter().copied().collect();
        self.engine.run(Task::Apply { step, verdict: Verdict::Update { norm: norm.sqrt() }, slices })?;
        self.publish(step, table, sums)?;
        Ok(loss)
    }

    /// Gathers the new weights, in the buffers of the gradients.
    fn publish(&mut self, step: Step, table: &SliceTable, mut chunks: Vec<Vec<f32>>) -> Outcome<()> {
        let own = self.own();
        chunks[own].clear();
        for slice in self.chunks[own].clone() {
            chunks[own].extend(self.engine.get(Key::Weights { step, slice })?);
        }
        self.all_gather(&mut chunks)?;
        for (chunk, slices) in chunks
            .iter()
            .zip(self.chunks.clone())
            .enumerate()
            .filter(|(c, _)| *c != own)
            .map(|(_, pair)| pair)
        {
            let mut at = 0;
            for slice in slices {
                let len = table.get(slice).map_or(0, caravan_types::Slice::len);
                let key = Key::Weights { step, slice };
                self.engine.put(key, chunk[at..at + len].to_vec())?;
                self.engine.run(Task::Install(key))?;
                at += len;
            }
        }
        Ok(())
    }
}

/// The model's slices in as many chunks of nearly the same size, in order.
fn chunks(table: &SliceTable, members: usize) -> Vec<Vec<SliceId>> {
    let all: usize = table.iter().map(|(_, slice)| slice.len()).sum();
    let (mut chunks, mut before) = (vec![Vec::new(); members], 0);
    for (id, slice) in table.iter() {
        chunks[(before * members / all).min(members - 1)].push(id);
        before += slice.len();
    }
    chunks
}

/// The address of the run's data.
fn data(run: &Path) -> Outcome<PathBuf> {
    let file: serde_json::Value = serde_json::from_slice(&std::fs::read(run.join("data.json"))?)?;
    Ok(file["path"].as_str().ok_or("data.json names no path")?.into())
}

/// One member's thread: steps until time is up.
fn member(
    run: &Path,
    rank: usize,
    members: usize,
    seconds: f64,
    to: TcpStream,
    from: TcpStream,
) -> Outcome<()> {
    let spec: RunSpec = serde_json::from_slice(&std::fs::read(run.join("spec.json"))?)?;
    let table = SliceTable::new(&spec.model);
    let sampler = Sampler::new(Arc::new(Dataset::open(&data(run)?)?), spec.seed, spec.batch)?;
    let (behind, queue) = mpsc::channel::<Vec<f32>>();
    let mut to = to;
    std::thread::spawn(move || {
        // The other end says what was wrong.
        while let Ok(piece) = queue.recv() {
            if to.write_all(bytemuck::cast_slice(&piece)).is_err() {
                return;
            }
        }
    });
    let each = spec.batch.lanes / members as u32;
    let first = rank as u32 * each;
    let mut member = Member {
        rank,
        chunks: chunks(&table, members),
        lanes: first..first + each,
        micro_batches: spec.batch.micro_batches,
        engine: Executor::new(&spec, 1, Arc::<Watch>::default(), Sampled(sampler), Nowhere)?,
        before: from,
        behind,
    };
    member.init(&spec)?;
    let (begun, root) = (Instant::now(), Node::root(spec.batch.lanes));
    let mut last = begun;
    for step in (1..).map(Step) {
        let loss = member.step(step, &table, root)?;
        let now = Instant::now();
        if rank == 0 {
            println!("step {} {:.3} {loss:.6}", step.0, (now - last).as_secs_f64() * 1e3);
        }
        last = now;
        // The first one says when it is over.
        let over = rank == 0 && begun.elapsed() > Duration::from_secs_f64(seconds);
        if member.sum([f64::from(u8::from(over)), 0.0])?[0] > 0.0 {
            return Ok(());
        }
    }
    Ok(())
}

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [run, members, seconds] = &args[..] else {
        return Err("usage: ring RUN_FOLDER MEMBERS SECONDS".into());
    };
    let (members, seconds) = (members.parse::<usize>()?, seconds.parse::<f64>()?);
    let listeners = (0..members).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<Vec<_>, _>>()?;
    let mut threads = Vec::new();
    let mut to = Vec::new();
    for rank in 0..members {
        let stream = TcpStream::connect(listeners[(rank + 1) % members].local_addr()?)?;
        stream.set_nodelay(true)?;
        to.push(stream);
    }
    for (rank, to) in to.into_iter().enumerate() {
        let (from, _) = listeners[rank].accept()?;
        let run = PathBuf::from(run);
        threads.push(std::thread::spawn(move || member(&run, rank, members, seconds, to, from)));
    }
    for thread in threads {
        thread.join().map_err(|_| "a member panicked")??;
    }
    Ok(())
}
