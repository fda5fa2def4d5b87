// The prebuilt llama.cpp's side of peers.py: node peers.mjs FOLDER FILE THREADS FLASH, then one measurement a line.
//
// Batches go straight to the binding beneath node-llama-cpp's contexts: its queue of promises and its sampling, which
// cost time for every token, are left out. No token is drawn; the ids fed are arbitrary.

import path from "node:path";
import readline from "node:readline";
import {pathToFileURL} from "node:url";

const [folder, file, threads, flash] = process.argv.slice(2);
const size = JSON.parse(process.env.PEERS_SIZES);
const say = (message) => process.stdout.write(JSON.stringify(message) + "\n");

const entry = path.join(folder, "node_modules", "node-llama-cpp", "dist", "index.js");
const {getLlama, getModuleVersion} = await import(pathToFileURL(entry));
const version = await getModuleVersion();
say({imported: true});

const llama = await getLlama({gpu: false, build: "never", maxThreads: Number(threads), logLevel: "error"});
const model = await llama.loadModel({modelPath: file, gpuLayers: 0});

async function open(sequences, cells) {
    const context = await model.createContext({
        sequences, contextSize: cells / sequences, batchSize: size.batch, threads: Number(threads),
        flashAttention: flash === "1", failedCreationRemedy: false
    });
    const raw = context._ctx;
    if (typeof raw?.decodeBatch !== "function")
        throw new Error(`node-llama-cpp ${version} hides its binding: another version is needed`);
    if (raw.getThreads() !== Number(threads) || context.batchSize !== size.batch)
        throw new Error(`node-llama-cpp runs ${raw.getThreads()} threads and batches of ${context.batchSize}`);
    return {
        // rows: [sequence, first position, ids], the last of each with logits
        async feed(rows) {
            raw.initBatch(rows.reduce((sum, [, , ids]) => sum + ids.length, 0));
            for (const [sequence, position, ids] of rows)
                raw.addToBatch(sequence, position, Uint32Array.from(ids), Uint32Array.of(ids.length - 1));
            await raw.decodeBatch();
        },
        clear() {
            for (let s = 0; s < sequences; s++) raw.disposeSequence(s);
        }
    };
}

// every sequence has its own cells here: the library offers no shared ones
const single = await open(1, size.cells);
const many = await open(size.streams, size.cells);
say({loaded: true});
const token = () => 100 + Math.floor(Math.random() * 40000);
const prompt = (length) => Array.from({length}, token);

async function timed(run) {
    const began = performance.now();
    await run();
    return (performance.now() - began) / 1000;
}

const measurements = {
    async prefill(count) {
        const ids = prompt(count);
        single.clear();
        return count / await timed(() => single.feed([[0, 0, ids]]));
    },
    async decode(count) {
        single.clear();
        await single.feed([[0, 0, prompt(size.prompt)]]);
        return count / await timed(async () => {
            for (let i = 0; i < count; i++) await single.feed([[0, size.prompt + i, [200 + i]]]);
        });
    },
    async streams(count) {
        const all = Array.from({length: size.streams}, (_, s) => s);
        many.clear();
        await many.feed(all.map((s) => [s, 0, prompt(size.prompt)]));
        return count * size.streams / await timed(async () => {
            for (let i = 0; i < count; i++) await many.feed(all.map((s) => [s, size.prompt + i, [200 + i]]));
        });
    }
};

for (const [name, count] of Object.entries(size.warm)) await measurements[name](count);
say({ready: true, version: `node-llama-cpp ${version} with llama.cpp ${llama.llamaCppRelease.release}`,
     system: llama.systemInfo.trim()});
for await (const line of readline.createInterface({input: process.stdin})) {
    const name = line.trim();
    await measurements[name](size.warm[name]); // after another side's turn the caches are cold
    say({value: await measurements[name](size.counts[name])});
}
process.exit(0);
